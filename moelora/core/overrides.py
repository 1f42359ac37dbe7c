"""Deciding in the routers' place: `use_experts`, `expert_weights` and `banned_experts`."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..config import MoeLoraConfig
from ..host_internals import assert_in_graph
from ..routers import Routing
from ..validation import check_number
from .context import ENTERED, Entered, MixtureContext
from .inputs import check_expert_weights

Experts = str | Iterable[str] | Mapping[str, float]


@dataclass(frozen=True)
class Override:
    """What the routers may not decide in a forward pass.

    Args:
        expert_ids, expert_weights: `[N, K]` of one row for all tokens, one a sequence, or one a
            token; None where the routers choose.
        banned: `[E]` bool, the experts that may not be chosen; None where all may.
        banned_numbers: the same by their numbers.
        complete: no slot is empty and no row names an expert twice.
    """

    expert_ids: Tensor | None = None
    expert_weights: Tensor | None = None
    banned: Tensor | None = None
    complete: bool = False
    banned_numbers: frozenset[int] = frozenset()

    @property
    def learns(self) -> bool:
        """Whether the given weights take a gradient."""
        return self.expert_weights is not None and self.expert_weights.requires_grad

    def routing(self, x: Tensor, batch: int) -> tuple[Routing, int]:
        """The routing of x `[…, d]` of `batch` sequences, and how many tokens each row stands for.

        Raises:
            ValueError: x is not made of the tokens or sequences that the weights were given for.
        """
        assert self.expert_ids is not None and self.expert_weights is not None
        ids = self.expert_ids.to(x.device)
        weights = self.expert_weights.to(x.device)
        if len(weights) == 1:
            num_tokens = x.shape[:-1].numel()
            ids = ids.expand(num_tokens, -1)
            weights = weights.expand(num_tokens, -1)
        each = tokens_per_row("expert_weights", len(weights), x, batch)
        return Routing(x.new_zeros(len(ids), 0), ids, weights), each


def tokens_per_row(what: str, rows: int, x: Tensor, batch: int) -> int:
    """How many tokens of x `[…, d]` each of `rows` given rows stands for: a sequence's, or one.

    Raises:
        ValueError: x is not made of the tokens or sequences that the rows were given for.
    """
    num_tokens = x.shape[:-1].numel()
    if rows == num_tokens:
        return 1
    if rows == batch and num_tokens % batch == 0:
        return num_tokens // batch
    raise ValueError(
        f"{what} has {rows} rows ({batch} sequences), but an adapted linear reads an input of "
        f"shape {tuple(x.shape)}, which is not made of these: give one row for each sequence of "
        f"this very batch [{batch}, E] (or weights for all [E]), or leave that linear out of "
        "target_modules."
    )


def entered_override(context: MixtureContext) -> Override | None:
    """What the innermost `use_experts` of this thread or task around the call decides, or None."""
    # torch.compile cannot read a context variable, so none is read where nobody is inside.
    if not context.overrides_entered:
        return None
    entered = context.entered()
    return entered[-1].override if entered else None


@contextmanager
def overriding(
    context: MixtureContext,
    experts: Experts | None,
    ban: str | Iterable[str] | None,
    device: torch.device,
) -> Iterator[None]:
    """What `use_experts` does; see there."""
    if experts is None and ban is None:
        raise ValueError(
            "use_experts() names nothing: give experts to use, or ban=… those not to choose."
        )
    override = entered_override(context) or Override()
    if experts is not None:
        override = _of_names(override, experts, context.config, device)
    override = with_bans(override, ban, context.config, device)
    entered = Entered(override)
    context.overrides_entered.append(entered.key)
    ENTERED.set((*ENTERED.get(), entered))
    try:
        yield
    finally:
        # Not by a token: a generator may leave later than one that it entered before, or elsewhere.
        entered.is_open = False
        context.overrides_entered.remove(entered.key)
        ENTERED.set(tuple(other for other in ENTERED.get() if other.is_open))


def override_of(
    context: MixtureContext, weights: Any, ban: Any, batch: int, length: int, device: torch.device
) -> Override | None:
    """What `use_experts` and a forward's `expert_weights` and `banned_experts` decide, or None.

    Raises:
        ValueError, TypeError: weights of another shape or not finite, or unknown names.
    """
    override = entered_override(context)
    if weights is not None:
        check_expert_weights(weights, batch, length, context.num_experts)
        override = _of_weights(override or Override(), weights)
    if weights is None and ban is None:
        return override
    return with_bans(override or Override(), ban, context.config, device)


def _of_weights(override: Override, weights: Tensor) -> Override:
    """`override` by weights `[…, E]` as slots: of those in use, or of all where they learn, and in
    a compiled graph, whose shapes are known before its values.
    """
    rows = weights.reshape(-1, weights.shape[-1])
    rows = rows if rows.dtype == torch.float64 else rows.float()
    if rows.requires_grad or torch.compiler.is_compiling():
        ids = torch.arange(rows.shape[1], device=rows.device).expand(len(rows), -1)
        return replace(override, expert_ids=ids, expert_weights=rows, complete=True)
    used = rows != 0
    slots = max(1, int(used.sum(1).max())) if len(rows) else 1
    ids = used.to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, :slots]
    # What is not in use has the weight 0 already.
    return replace(
        override,
        expert_ids=ids.masked_fill(~used.gather(1, ids), -1),
        expert_weights=rows.gather(1, ids),
        complete=False,
    )


def _names(what: str, names: Any) -> list[str]:
    """The names meant by a string or several of them; TypeError for anything else."""
    is_one = isinstance(names, str) or not isinstance(names, Iterable)
    listed: list[Any] = [names] if is_one else list(names)
    if wrong := [name for name in listed if not isinstance(name, str)]:
        raise TypeError(
            f"{what} names {wrong[0]!r}, a {type(wrong[0]).__name__}; expected names of experts."
        )
    return listed


def _of_names(
    override: Override, experts: Experts, config: MoeLoraConfig, device: torch.device
) -> Override:
    """`override` by names of experts, with weights or with 1 each."""
    given = experts if isinstance(experts, Mapping) else {}
    weights = {name: given.get(name, 1.0) for name in _names("use_experts", experts)}
    if not weights:
        raise ValueError(
            "use_experts names nothing; for the base alone write {name: 0.0}. The experts are: "
            f"{', '.join(config.expert_names or [])}."
        )
    ids = [config.expert_index(name) for name in weights]
    for name, weight in weights.items():
        check_number(f"the weight of expert {name!r}", weight, -math.inf, math.inf)
    return replace(
        override,
        expert_ids=torch.tensor([ids], dtype=torch.int64, device=device),
        expert_weights=torch.tensor([list(weights.values())], dtype=torch.float32, device=device),
        complete=True,
    )


def _check_left(banned: set[int], config: MoeLoraConfig, asked: bool) -> None:
    """Raise ValueError where all experts are banned, or a router that is asked has none left."""
    names = config.routed_expert_names
    if banned.issuperset(range(len(names))):
        raise ValueError(f"All experts are banned ({', '.join(names)}): leave one at least.")
    if config.null_expert or not asked:
        return
    for layer, experts in (config.layer_experts or {}).items():
        if banned.issuperset(experts):
            own = ", ".join(names[e] for e in experts)
            raise ValueError(
                f"All experts that {layer} has are banned ({own}): leave one of them at least."
            )


def _check_unused(ids: Tensor, weights: Tensor, banned: Tensor, names: list[str]) -> None:
    """Raise where an expert is banned `[E]` and used all the same; a weight of 0 uses nothing."""
    in_use = (ids >= 0) & (weights != 0)
    if torch.compiler.is_compiling():
        both = in_use & banned.to(ids.device)[ids.clamp(min=0)]
        problem = "An expert would be used and is banned: drop one of the two."
        assert_in_graph(~both.any(), problem)
        return
    used = ids[in_use].unique().cpu().tolist()
    on_host = banned.cpu()
    if twice := [names[e] for e in used if on_host[e]]:
        raise ValueError(f"{', '.join(twice)} would be used and is banned: drop one of the two.")


def with_bans(
    override: Override, ban: Any, config: MoeLoraConfig, device: torch.device
) -> Override:
    """`override` with these experts banned too, if any is left and none of them is used."""
    numbers = set(override.banned_numbers)
    if ban is not None:
        numbers |= {config.expert_index(name) for name in _names("banned_experts", ban)}
    if not numbers:
        return override
    _check_left(numbers, config, asked=override.expert_weights is None)
    table = [e in numbers for e in range(config.num_experts)]
    banned = torch.tensor(table, dtype=torch.bool, device=device)
    if override.expert_ids is not None and override.expert_weights is not None:
        names = config.expert_names or []
        _check_unused(override.expert_ids, override.expert_weights, banned, names)
    return replace(override, banned=banned, banned_numbers=frozenset(numbers))
