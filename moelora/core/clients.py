"""Clients that put a forward of their own in the model's place and call the backbone from it.

TRL and Liger do so to compute a loss without the logits of the whole vocabulary. The model's own
forward then does not run, so the pass is begun where the backbone is called; what it must know of
the call (where the labels begin) is noted where the model is called.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers.utils.generic import ModelOutput

from ..host_internals import hooks_of, inside_backward
from .forward import extended, note, prepare
from .forward_pass import running_pass
from .inputs import OwnInputs, by_name
from .overrides import entered_override
from .prompts import carried_by_cache, read_prompt


@dataclass
class Call:
    """A model is called whose forward is a client's.

    Args:
        model: the model.
        inputs: of the call, by name.
        outer: the call around this one.
        losses: the router losses of the pass that was begun at its backbone.
    """

    model: Any
    inputs: dict[str, Any]
    outer: Call | None
    losses: Any = None


class _Calls(threading.local):
    """Each thread's innermost call."""

    def __init__(self):
        # See `forward_pass._Running`.
        self.innermost: Call | None = None


_calls = _Calls()


def call_of_client(model: Any, call: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
    """`call(*args, **kwargs)`, noted for the backbone; the client's loss is watched for its scale.

    Args:
        model: the `MixtureModel` that is called.
        call: what calls the client's forward.
        args, kwargs: of the call.
    """
    inputs = {**kwargs, **by_name(type(model).forward, model, args)}
    labels = _labels_after_prompts(model, inputs)
    if labels is not None and "labels" in kwargs:
        kwargs["labels"] = inputs["labels"] = labels
    noted = Call(model, inputs, _calls.innermost)
    _calls.innermost = noted
    try:
        outputs = call(*args, **kwargs)
    finally:
        _calls.innermost = noted.outer
    losses = noted.losses
    if losses is not None and isinstance(outputs, ModelOutput):
        for name, probe in (("loss", losses.probe), ("log_probs", losses.probe_tokens)):
            value = outputs.get(name)
            if isinstance(value, Tensor) and value.requires_grad:
                outputs[name] = probe(value)
    return outputs


def _labels_after_prompts(model: Any, inputs: dict[str, Any]) -> Tensor | None:
    """At sequence level the labels without those inside of prefix prompts; None: as they are."""
    mixture = model.moelora
    own = OwnInputs.taken_from(dict(inputs))
    override = entered_override(mixture)
    forced = override is not None and override.expert_weights is not None
    forced = forced or own.expert_weights is not None or own.expert_routing is not None
    if not mixture.reads_prompts or forced or inputs.get("labels") is None:
        return None
    if carried_by_cache(inputs, len(inputs["labels"]), own.router_mask):
        return None
    learning = model.training and torch.is_grad_enabled()
    prefix = mixture.config.router_prefix_tokens
    return read_prompt(inputs, own.router_mask, prefix, model.is_classifier, learning)[1]


class BackboneHook:
    """Begins a forward pass where the backbone is called and none is under way, and ends it.

    Args:
        model: the `MixtureModel`.
        backbone: its submodule.
    """

    def __init__(self, model: Any, backbone: nn.Module):
        self.model = model
        # Kept: see `ExpertHook`.
        self.handles: list[RemovableHandle] = [
            backbone.register_forward_pre_hook(self.begin, with_kwargs=True),
            backbone.register_forward_hook(self.end, with_kwargs=True, always_call=True),
        ]

    def begin(self, backbone: nn.Module, args: tuple, kwargs: dict) -> tuple | None:
        """Begin a pass; our inputs are taken out of the backbone's."""
        model = self.model
        running = running_pass(model.moelora)
        if running is not None and running.opener is not self:
            return None
        if running is not None:
            # An interrupt has left it open: a backbone does not call itself.
            running.end()
        elif inside_backward():
            return None
        noted = _calls.innermost
        if noted is not None and noted.model is not model:
            noted = None
        kwargs = dict(kwargs)
        inputs = dict(noted.inputs) if noted is not None else {}
        inputs |= kwargs | by_name(type(backbone).forward, backbone, args)
        own = OwnInputs.taken_from(inputs)
        OwnInputs.taken_from(kwargs)
        self._check(own, noted, backbone)
        learning = model.training and torch.is_grad_enabled()
        running = prepare(model, own, inputs, learning, of_client=True)
        running.opener = self
        if noted is not None and learning:
            noted.losses = running.losses
        running.begin()
        return args, kwargs

    def end(self, backbone: nn.Module, args: tuple, kwargs: dict, outputs: Any) -> Any:
        """End the pass that was begun here; the outputs gain ours."""
        running = running_pass(self.model.moelora)
        if running is None or running.opener is not self:
            return None
        running.end()
        running.close()
        if outputs is None:
            # An error is on its way.
            return None
        learning = self.model.training and torch.is_grad_enabled()
        note(outputs, running, learning)
        return extended(outputs, running, learning, has_labels=False)

    def remove(self) -> None:
        """Take the hooks off."""
        for handle in self.handles:
            handle.remove()

    def _check(self, own: OwnInputs, noted: Call | None, backbone: nn.Module) -> None:
        """Raise where what is asked for needs the model's own forward."""
        if own.routing_only:
            raise ValueError(
                "output_expert_routing='only' (and route()) needs the model's own forward, which a "
                "client has replaced: delete model.forward, or ask before."
            )
        inside = {id(module) for module in backbone.modules()}
        if noted is None:
            return
        for name in self.model.moelora.linears():
            if id(self.model.get_submodule(name)) not in inside:
                raise ValueError(
                    f"{name} has experts, and a client that has replaced the model's forward "
                    "(TRL, Liger) computes with its weight alone, so they would not be used: leave "
                    "it out of target_modules."
                )


def watch_backbones(model: Any) -> None:
    """Hook what clients call in the model's place: its backbone, and the decoder inside of it."""
    for backbone in dict.fromkeys((model.base_model, model.get_decoder())):
        if isinstance(backbone, nn.Module) and backbone is not model:
            BackboneHook(model, backbone)


def unwatch_backbones(model: nn.Module) -> None:
    """Take the hooks of `watch_backbones` off."""
    for module in model.modules():
        for hook in hooks_of(module):
            owner = getattr(hook, "__self__", None)
            if isinstance(owner, BackboneHook):
                owner.remove()
