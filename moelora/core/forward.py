"""One forward pass of a model with a mixture inside: what its routers need to know, and what its
output gains.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, make_dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers.utils.generic import ModelOutput

from ..routers import Routing
from .forward_pass import ForwardState, RoutingDone
from .losses import check_expert_targets, probe_loss, sole_loss
from .overrides import Forcing, forcing_of
from .prompts import prompt_and_labels

OWN_INPUTS = (
    "router_mask",
    "expert_routing",
    "expert_targets",
    "output_expert_routing",
    "expert_weights",
    "banned_experts",
)
# A value of output_expert_routing: nothing but the routing is wanted.
ROUTING_ONLY = "only"
OWN_OUTPUTS = ("expert_aux_loss", "expert_routing")


@dataclass
class RoutingOutput(ModelOutput):
    """What a forward with output_expert_routing="only" gives: one `Routing` a router, which takes
    gradients.
    """

    expert_routing: tuple[Routing, ...] | None = None


def run_forward(model: Any, base_forward: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
    """Call `base_forward` with the routers told about this pass; returns the base's output,
    extended.

    Raises:
        ValueError: arguments that do not fit the batch or the routing level, each with its remedy.
    """
    own = {name: kwargs.pop(name, None) for name in OWN_INPUTS}
    if args:
        kwargs.update(_by_name(base_forward, model, args))
    state = _state(model, kwargs, own)
    mixture = model.moelora
    counting = state.with_losses and model.training and torch.is_grad_enabled()
    if counting:
        mixture.load.begin_forward(mixture.router_weight())
    with mixture.running(state):
        try:
            outputs = base_forward(model, **kwargs)
        except RoutingDone:
            outputs = None
    state.closed = True
    if state.routing_only:
        return RoutingOutput(expert_routing=_routing(state))
    if counting:
        mixture.load.end_forward(state.counts)
    return _extended(outputs, state, probe=counting and kwargs.get("labels") is not None)


def _state(model: Any, kwargs: dict[str, Any], own: dict[str, Any]) -> ForwardState:
    """The state of this forward pass; labels that a prefix prompt takes out of the loss are masked
    in `kwargs`.
    """
    config = model.moelora_config
    batch, length = _batch_shape(kwargs)
    learning = model.training and torch.is_grad_enabled()
    # Once, not where it is read: the backward pass may recompute after the forcing has ended.
    forcing = forcing_of(model, own, batch, length)
    forced = forcing is not None and forcing.chooses
    if own["expert_targets"] is not None:
        check_expert_targets(
            own["expert_targets"], batch, length, config.num_choices, config.routing_level
        )
        _check_not_banned(own["expert_targets"], forcing)
    routing_only = own["output_expert_routing"] == ROUTING_ONLY
    state = ForwardState(
        batch=batch,
        length=length,
        token_mask=_token_mask(kwargs.get("attention_mask"), batch, length),
        expert_targets=own["expert_targets"],
        num_items=kwargs.get("num_items_in_batch"),
        sequences_are_items=model.is_classifier,
        with_losses=not (forced or routing_only) and _wants_losses(model, own, learning),
        keep_routings=bool(own["output_expert_routing"]) or config.routing_level == "sequence",
        routing_only=routing_only,
        carried=own["expert_routing"],
        forcing=forcing,
    )
    if config.routing_level == "sequence" and not forced:
        # Where nothing but the routing is asked for, no label can leak into a prompt.
        answers = learning and not routing_only
        prompt_and_labels(state, kwargs, own["router_mask"], config, model.is_classifier, answers)
    elif own["router_mask"] is not None and config.routing_level == "token":
        raise ValueError(
            "router_mask marks the prompt for routing_level='sequence'; at token level drop it."
        )
    if state.with_losses and learning and kwargs.get("labels") is None:
        state.loss_gradient = _outside_scale(model)
    return state


def _wants_losses(model: Any, own: dict[str, Any], learning: bool) -> bool:
    """Whether the router losses are computed: to learn from, or because the caller asked to see
    them.
    """
    config, mixture = model.moelora_config, model.moelora
    if own["expert_routing"] is not None or mixture.router_weight() is None:
        return False
    balanced = (
        config.router_aux_loss_coef or config.router_z_loss_coef or config.router_bias_update_rate
    )
    return bool(
        own["expert_targets"] is not None or own["output_expert_routing"] or (learning and balanced)
    )


def _check_not_banned(targets: Tensor, forcing: Forcing | None) -> None:
    if forcing is None or forcing.banned is None:
        return
    # A target beyond the experts is no expert, which cannot be banned.
    banned = torch.nn.functional.pad(forcing.banned.to(targets.device), (0, 1))[
        targets.clamp(min=0)
    ]
    banned = banned & (targets >= 0)
    if bool(banned.any()):
        raise ValueError(
            f"expert_targets asks for expert {int(targets[banned][0])}, which is banned: set such targets to −100, "
            "or lift the ban."
        )


def _outside_scale(model: Any) -> float:
    """d(what backward is called on)/d(loss) where the training loop computes the loss from the
    logits.
    """
    if model.moelora.loss_scale is not None:
        return model.moelora.loss_scale
    device = model.device.type
    half = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == torch.float16
    if half or (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        raise ValueError(
            "The loss is computed outside of the model (label smoothing or compute_loss_func) under fp16 or "
            "several processes, so the model cannot see how it is scaled and the router losses would be off. "
            "Add moelora.training.MoeLoraCallback() to the Trainer's callbacks, or set model.moelora.loss_scale."
        )
    return 1.0


def _token_mask(mask: Any, batch: int, length: int) -> Tensor | None:
    """This step's part of a 2-D attention mask, `[batch, length]` bool; None where there is no such
    mask.
    """
    if (
        not isinstance(mask, Tensor)
        or mask.dim() != 2
        or mask.shape[0] != batch
        or mask.shape[1] < length
    ):
        return None
    # With a cache the mask also covers the tokens before this step's.
    return mask[:, mask.shape[1] - length :].bool()


def _batch_shape(kwargs: dict[str, Any]) -> tuple[int, int]:
    """(batch, length) of the tokens of this forward pass."""
    for name in ("input_ids", "inputs_embeds"):
        tensor = kwargs.get(name)
        if isinstance(tensor, Tensor):
            return tensor.shape[0], tensor.shape[1]
    raise ValueError("Neither input_ids nor inputs_embeds was given.")


def _by_name(base_forward: Callable, model: Any, args: tuple) -> dict[str, Any]:
    """Positional arguments of the base's forward by their names."""
    bound = inspect.signature(base_forward).bind_partial(model, *args).arguments
    return dict(list(bound.items())[1:])


def _extended(outputs: Any, state: ForwardState, probe: bool) -> Any:
    """The base's outputs with the loss probed and the routers' results added; a tuple stays as long
    as it is.
    """
    if isinstance(outputs, tuple):
        return (probe_loss(outputs[0], state), *outputs[1:]) if probe else outputs
    if probe and outputs.loss is not None:
        outputs.loss = probe_loss(outputs.loss, state)
    gained = {}
    if state.loss_values:
        values = [v.float() for v in state.loss_values.values()]
        gained["expert_aux_loss"] = torch.stack([v.to(values[0].device) for v in values]).sum()
        if outputs.get("loss") is None and state.expert_targets is not None:
            # Nothing but the choice of experts is learned: Trainer asks for a loss all the same.
            gained["loss"] = sole_loss(gained["expert_aux_loss"], outputs.logits, state)
    if state.keep_routings:
        gained["expert_routing"] = _routing(state)
    return _output_class(type(outputs))(**{**outputs, **gained}) if gained else outputs


def _routing(state: ForwardState) -> tuple[Routing, ...]:
    return state.carried or tuple(state.routings[i] for i in sorted(state.routings))


@functools.cache
def _output_class(base: type) -> type:
    """`base` with two more fields; a class of its own, since DDP rebuilds outputs from their
    class's fields.
    """
    fields = [(name, object, None) for name in OWN_OUTPUTS]
    return make_dataclass(
        f"MoeLora{base.__name__}", fields, bases=(base,), namespace={"__module__": __name__}
    )
