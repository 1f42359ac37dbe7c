"""Our seven inputs of a forward pass: taken out of the base's, and checked against the batch."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from ..host_internals import assert_in_graph
from .context import MixtureContext
from .losses import IGNORE

# A value of output_expert_routing: nothing but the routing is wanted.
ROUTING_ONLY = "only"


@dataclass(frozen=True)
class OwnInputs:
    """What a model takes beside its base's inputs; `forward.__doc__` describes each."""

    router_mask: Any = None
    expert_routing: Any = None
    expert_targets: Any = None
    output_expert_routing: Any = None
    expert_weights: Any = None
    banned_experts: Any = None
    router_context: Any = None

    @classmethod
    def taken_from(cls, kwargs: dict[str, Any]) -> OwnInputs:
        """Ours among the keywords of a forward, which are left with the base's."""
        return cls(**{name: kwargs.pop(name) for name in OWN_INPUTS if name in kwargs})

    @property
    def routing_only(self) -> bool:
        """Whether the routing and nothing else is asked for."""
        return self.output_expert_routing == ROUTING_ONLY

    def check(
        self, context: MixtureContext, batch: int, length: int, forced: bool, banned: Tensor | None
    ) -> None:
        """Raise where an input does not fit a batch of `batch` sequences of `length` tokens.

        Args:
            context: the mixture.
            batch, length: of the tokens.
            forced: the routers are not asked.
            banned: `[E]` bool, the experts that may not be chosen, or None.

        Raises:
            ValueError, TypeError: with what came, what was expected, and the remedy.
        """
        asked = self.output_expert_routing
        if not (asked is None or isinstance(asked, bool) or asked == ROUTING_ONLY):
            raise ValueError(
                f"output_expert_routing={asked!r}; expected True, False, or {ROUTING_ONLY!r} for "
                "the routing and nothing else."
            )
        if self.router_mask is not None and not context.reads_prompts:
            raise ValueError(
                "router_mask marks the prompt for routing_level='sequence' and router='hybrid'; "
                f"router={context.config.router!r} at "
                f"routing_level={context.config.routing_level!r} reads none: drop it."
            )
        if self.router_context is not None:
            _check_context(self.router_context, context, batch)
        for other in ("expert_routing", "expert_targets"):
            if self.expert_weights is not None and getattr(self, other) is not None:
                raise ValueError(
                    f"expert_weights leaves the routers nothing to do: drop it or {other}."
                )
        if self.expert_targets is not None:
            _check_targets(self.expert_targets, context, batch, length, banned)
        if self.expert_routing is not None and not forced:
            _check_routing(self.expert_routing, context, batch, length)


OWN_INPUTS = tuple(field.name for field in fields(OwnInputs))


def by_name(forward: Callable, module: Any, args: tuple) -> dict[str, Any]:
    """Positional arguments of `forward`, a plain function of `module`, by their names."""
    if not args:
        return {}
    bound = inspect.signature(forward).bind_partial(module, *args).arguments
    return dict(list(bound.items())[1:])


def batch_shape(kwargs: dict[str, Any]) -> tuple[int, int]:
    """(batch, length) of the tokens of this forward pass."""
    for name, axes in (("input_ids", "[batch, length]"), ("inputs_embeds", "[batch, length, d]")):
        tensor = kwargs.get(name)
        if isinstance(tensor, Tensor):
            if tensor.dim() != axes.count(",") + 1:
                raise ValueError(f"{name} has shape {list(tensor.shape)}; expected {axes}.")
            return tensor.shape[0], tensor.shape[1]
    raise ValueError("Neither input_ids nor inputs_embeds was given.")


def token_mask(mask: Any, batch: int, length: int) -> Tensor | None:
    """This step's part of a 2-D attention mask, `[batch, length]` bool, or None."""
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        return None
    if mask.shape[0] != batch or mask.shape[1] < length:
        return None
    # With a cache the mask also covers the tokens before this step's.
    return mask[:, mask.shape[1] - length :].bool()


def _check_tensor(name: str, value: Any, what: str, shapes: list[tuple[int, ...]]) -> None:
    """Raise unless `value` is a tensor of one of these shapes."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} is a {type(value).__name__}; expected a tensor of {what}.")
    if tuple(value.shape) not in shapes:
        raise ValueError(
            f"{name} has shape {tuple(value.shape)}; expected {what}, one of {shapes} for this "
            "batch (padding included)."
        )


def check_expert_weights(weights: Any, batch: int, length: int, num_experts: int) -> None:
    """Raise unless `weights` is finite and `[E]`, `[batch, E]` or `[batch, length, E]`."""
    shapes = [(num_experts,), (batch, num_experts), (batch, length, num_experts)]
    _check_tensor("expert_weights", weights, f"a weight for each of {num_experts} experts", shapes)
    if weights.is_complex() or weights.dtype == torch.bool:
        raise TypeError(f"expert_weights is a {weights.dtype}; expected real numbers.")
    finite = weights.isfinite().all()
    problem = "expert_weights contains NaN or Inf; expected finite numbers, 0 for an unused expert."
    if torch.compiler.is_compiling():
        assert_in_graph(finite, problem)
    elif not bool(finite):
        raise ValueError(problem)


def _check_context(given: Any, context: MixtureContext, batch: int) -> None:
    """Raise unless `given` is a vector for each sequence, of the width that the routers read."""
    router = context.router_list[0]
    if router.reads != "context":
        raise ValueError(
            f"router_context is read by router='context', and this mixture has "
            f"{context.config.router!r}: drop it."
        )
    what = "a vector for each sequence, as wide as router_options['context_size']"
    _check_tensor("router_context", given, what, [(batch, router.in_features)])
    if given.is_complex():
        raise TypeError(f"router_context is a {given.dtype}; expected real numbers.")


def _check_targets(
    targets: Any, context: MixtureContext, batch: int, length: int, banned: Tensor | None
) -> None:
    """Raise where `targets` are not numbers of choices `[batch]`, or `[batch, length]`."""
    config = context.config
    shapes = [(batch,), (batch, length)] if context.by_token else [(batch,)]
    what = f"expert numbers at routing_level={config.routing_level!r}"
    if not context.routers_have_parameters:
        raise ValueError(
            f"expert_targets teach the routers, and router={config.router!r} has nothing to learn: "
            "drop them."
        )
    _check_tensor("expert_targets", targets, what, shapes)
    if targets.is_floating_point() or targets.is_complex() or targets.dtype == torch.bool:
        raise ValueError(
            f"expert_targets has dtype {targets.dtype}; expected integers (expert numbers or −100)."
        )
    # A target beyond the routed experts is the null expert, which cannot be banned.
    routed = None if banned is None else banned[: config.num_routed_experts].to(targets.device)
    banned = None if routed is None else torch.nn.functional.pad(routed, (0, 1))
    if torch.compiler.is_compiling():
        _check_targets_in_graph(targets, config.num_choices, banned)
        return
    counted = targets[targets != IGNORE]
    outside = counted[(counted < 0) | (counted >= config.num_choices)]
    if outside.numel():
        raise ValueError(
            f"expert_targets contains {sorted(set(outside.tolist()))[:5]}; expected 0 … "
            f"{config.num_choices - 1}, or −100 to leave a row out."
        )
    if banned is None:
        return
    refused = counted[banned[counted]]
    if refused.numel():
        raise ValueError(
            f"expert_targets asks for expert {int(refused[0])}, which is banned: set such targets "
            "to −100, or lift the ban."
        )


def _check_targets_in_graph(targets: Tensor, num_choices: int, banned: Tensor | None) -> None:
    """The same of their values, where these are known only when the graph runs."""
    left_out = targets == IGNORE
    inside = (targets >= 0) & (targets < num_choices)
    assert_in_graph(
        (left_out | inside).all(),
        f"expert_targets must be 0 … {num_choices - 1}, or −100 to leave a row out.",
    )
    if banned is not None:
        allowed = ~banned[targets.clamp(0, num_choices - 1)]
        assert_in_graph(
            (left_out | allowed).all(),
            "expert_targets asks for an expert that is banned: set such targets to −100, or lift "
            "the ban.",
        )


def _check_routing(routing: Any, context: MixtureContext, batch: int, length: int) -> None:
    """Raise where `routing` is not one `Routing` a router for this batch."""
    if not isinstance(routing, (tuple, list)) or not all(len(own) == 3 for own in routing):
        raise TypeError(
            f"expert_routing is a {type(routing).__name__}; expected outputs.expert_routing of an "
            "earlier forward, one Routing a router."
        )
    num_routers = len(context.router_list)
    if len(routing) != num_routers:
        raise ValueError(
            f"expert_routing is of {len(routing)} routers; this mixture has {num_routers}."
        )
    rows = len(routing[0][1])
    expected = batch * length if context.by_token else batch
    if rows != expected:
        size = f"{batch} × {length} tokens" if context.by_token else f"a batch of {batch}"
        raise ValueError(
            f"expert_routing has {rows} rows for {size}: pass the routing of these very tokens, or "
            "at routing_level='sequence' of their prompts."
        )
