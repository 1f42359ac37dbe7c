"""One call of a model with a mixture inside: our inputs in, the base's forward, our outputs out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, make_dataclass
from typing import TYPE_CHECKING, Any, get_args, get_type_hints

import torch
import torch.distributed as dist
from transformers.utils.generic import ModelOutput

from ..host_internals import is_data_parallel_replica
from ..routers import Routing
from .forward_pass import ForwardPass, RoutingDone
from .inputs import OwnInputs, batch_shape, by_name, token_mask
from .losses import UNKNOWN_SCALE, LossScale, RouterLosses
from .mixture import Mixture
from .overrides import override_of
from .prompts import (
    carried_by_cache,
    context_on_cache,
    note_context_on_cache,
    note_on_cache,
    plans_on_cache,
    read_prompt,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

OWN_OUTPUTS = ("expert_aux_loss", "expert_routing")


@dataclass
class RoutingOutput(ModelOutput):
    """What output_expert_routing="only" gives: one `Routing` a router, with gradients."""

    expert_routing: tuple[Routing, ...] | None = None


def run_forward(model: Any, base_forward: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
    """Call `base_forward` as one forward pass of the mixture; returns the base's output, extended.

    Args:
        model: the `MixtureModel` that is called.
        base_forward: its base's forward, a plain function.
        args, kwargs: of the call.

    Raises:
        ValueError, TypeError: inputs that do not fit the batch or the routing level.
        RuntimeError: inside of `nn.DataParallel`.
    """
    if is_data_parallel_replica(model):
        raise RuntimeError(
            "nn.DataParallel copies a model for each GPU in a way that the experts cannot follow. "
            "Start one process a GPU instead (torchrun or accelerate launch, with "
            "DistributedDataParallel), or show the process one GPU (CUDA_VISIBLE_DEVICES=0)."
        )
    own = OwnInputs.taken_from(kwargs)
    kwargs.update(by_name(base_forward, model, args))
    learning = model.training and torch.is_grad_enabled()
    running = prepare(model, own, kwargs, learning)
    try:
        outputs = running.run(lambda: base_forward(model, **kwargs))
    except RoutingDone:
        outputs = None
    finally:
        running.close()
    if running.routing_only:
        return RoutingOutput(expert_routing=running.kept_routings())
    note(outputs, running, learning)
    return extended(outputs, running, learning, kwargs.get("labels") is not None)


def prepare(
    model: Any, own: OwnInputs, kwargs: dict[str, Any], learning: bool, of_client: bool = False
) -> ForwardPass:
    """A forward pass that is ready to run; labels inside of a prefix prompt are masked in `kwargs`.

    Args:
        model: the `MixtureModel`.
        own: our inputs.
        kwargs: the base's.
        learning: a backward pass may follow.
        of_client: a client computes the loss itself, from what the backbone gives.
    """
    mixture: Mixture = model.moelora
    running = _begin(model, own, kwargs, learning, of_client)
    if learning:
        mixture.check_resident("train")
        if running.losses is not None:
            mixture.load.begin_forward(mixture.trained_router_parameter())
    return running


def note(outputs: Any, running: ForwardPass, learning: bool) -> None:
    """What a pass leaves behind: the experts' load, and on a cache what the prompt decided."""
    mixture = running.context
    if learning and running.losses is not None:
        mixture.load.end_forward(running.losses.counts)
    if mixture.reads_prompts and not running.forced and (kept := running.kept_prompts()):
        note_on_cache(outputs, kept)
    if running.router_context is not None:
        note_context_on_cache(outputs, running.router_context)


def _begin(
    model: Any, own: OwnInputs, kwargs: dict[str, Any], learning: bool, of_client: bool
) -> ForwardPass:
    """The forward pass; labels inside of a prefix prompt are masked in `kwargs`."""
    mixture: Mixture = model.moelora
    batch, length = batch_shape(kwargs)
    # Once, not where it is read: the backward pass may recompute after `use_experts` has ended.
    weights = own.expert_weights
    bans = own.banned_experts
    override = override_of(mixture, weights, bans, batch, length, compute_device(model))
    running = ForwardPass(
        mixture,
        batch,
        length,
        carried=own.expert_routing,
        override=override,
        keep_routings=bool(own.output_expert_routing) or mixture.routes_prompts,
        routing_only=own.routing_only,
        token_ids=kwargs.get("input_ids"),
        router_context=own.router_context,
    )
    banned = None if override is None else override.banned
    own.check(mixture, batch, length, running.forced, banned)
    if running.router_context is None:
        running.router_context = context_on_cache(kwargs, batch)
    if mixture.reads_prompts and not running.forced:
        _begin_prompts(model, running, own, kwargs, learning)
    if not (running.forced or own.routing_only) and _wants_losses(mixture, own, learning):
        has_labels = kwargs.get("labels") is not None
        targeted = own.expert_targets is not None
        num_items = kwargs.get("num_items_in_batch")
        running.losses = RouterLosses(
            mixture,
            batch,
            length,
            scale=_loss_scale(model, has_labels, learning, num_items is not None),
            token_mask=token_mask(kwargs.get("attention_mask"), batch, length),
            targets=own.expert_targets,
            num_items=num_items,
            sequences_are_items=model.is_classifier,
            labels=kwargs.get("labels") if of_client else None,
            has_loss=learning and (has_labels or targeted) and not of_client,
        )
    return running


def _begin_prompts(
    model: Any, running: ForwardPass, own: OwnInputs, kwargs: dict[str, Any], learning: bool
) -> None:
    """Let the pass know its prompts; labels inside of a prefix prompt are masked in `kwargs`."""
    mixture: Mixture = model.moelora
    if not mixture.routes_prompts:
        running.known_prompts = carried_by_cache(kwargs, running.batch, own.router_mask)
    else:
        # A cache is not asked where nobody needs its answer: a static one answers by a tensor.
        noted = own.expert_routing or carried_by_cache(kwargs, running.batch, own.router_mask)
        running.carried = noted
        running.plans = plans_on_cache(kwargs, noted)
    if running.carried is not None or running.known_prompts is not None:
        return
    # Where nothing but the routing is asked for, no label can leak into a prompt.
    answers = learning and not own.routing_only
    prefix = mixture.config.router_prefix_tokens
    running.prompt_mask, labels = read_prompt(
        kwargs, own.router_mask, prefix, model.is_classifier, answers
    )
    if labels is not None:
        kwargs["labels"] = labels


def _wants_losses(mixture: Mixture, own: OwnInputs, learning: bool) -> bool:
    """Whether router losses are computed: to learn from, or because the caller asked for them."""
    config = mixture.config
    if own.expert_routing is not None or mixture.trained_router_parameter() is None:
        return False
    if own.expert_targets is not None or own.output_expert_routing:
        return True
    rates = (config.router_aux_loss_coef, config.router_z_loss_coef, config.router_bias_update_rate)
    return learning and (any(rates) or mixture.counts_load)


def _loss_scale(model: Any, has_labels: bool, learning: bool, has_items: bool) -> LossScale:
    """The scale to begin with: what is right where the loop computes the loss from the logits.

    Raises:
        ValueError: it does, and how it scales that loss cannot be known.
    """
    mixture: Mixture = model.moelora
    scale = mixture.loss_scale
    if not has_items and mixture.mean_loss_scale is not None:
        scale = mixture.mean_loss_scale
    assumed = scale is None and not has_items
    device = compute_device(model)
    unknown = ""
    if scale is None and learning:
        half = torch.is_autocast_enabled(device.type)
        half = half and torch.get_autocast_dtype(device.type) == torch.float16
        if half or (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
            unknown = UNKNOWN_SCALE
    if unknown and not has_labels:
        raise ValueError(unknown)
    if scale is None:
        # In a compiled graph, where nothing can be raised, NaN says it.
        scale = float("nan") if unknown else 1.0
    dtype = torch.float64 if model.dtype == torch.float64 else torch.float32
    return LossScale(torch.full((), scale, dtype=dtype, device=device), unknown, assumed)


def compute_device(model: PreTrainedModel) -> torch.device:
    """The model's device; of an offloaded one, whose weights are nowhere, the CPU."""
    return torch.device("cpu") if model.device.type == "meta" else model.device


def extended(outputs: Any, running: ForwardPass, learning: bool, has_labels: bool) -> Any:
    """The base's outputs with the loss probed and ours added; a tuple stays as long as it is."""
    losses = running.losses
    probe = learning and has_labels
    if isinstance(outputs, tuple):
        return (losses.probe(outputs[0]), *outputs[1:]) if probe and losses else outputs
    if losses is not None and probe and outputs.loss is not None:
        outputs.loss = losses.probe(outputs.loss)
    gained: dict[str, Any] = {}
    if losses is not None and losses.values:
        gained["expert_aux_loss"] = losses.total()
        if losses.targets is not None and not has_labels and "logits" in outputs:
            # Nothing but the choice of experts is learned: Trainer asks for a loss all the same.
            gained["loss"] = losses.alone(outputs.logits)
    if running.keep_routings:
        gained["expert_routing"] = running.kept_routings()
    return _output_class(type(outputs))(**{**outputs, **gained}) if gained else outputs


# By the base's class of outputs. Not functools.cache, which torch.compile looks through.
_OUTPUT_CLASSES: dict[type, type] = {}


def _output_class(base: type) -> type:
    """`base` with two more fields: DDP rebuilds outputs by the fields of their class."""
    if base not in _OUTPUT_CLASSES:
        fields = [(name, object, None) for name in OWN_OUTPUTS]
        _OUTPUT_CLASSES[base] = make_dataclass(
            f"MoeLora{base.__name__}", fields, bases=(base,), namespace={"__module__": __name__}
        )
    return _OUTPUT_CLASSES[base]


def make_output_classes(base_forward: Callable) -> None:
    """Make the classes of outputs that `base_forward` is annotated with, before any tracing."""
    annotation = get_type_hints(base_forward).get("return")
    for kind in (annotation, *get_args(annotation)):
        if isinstance(kind, type) and issubclass(kind, ModelOutput):
            _output_class(kind)
