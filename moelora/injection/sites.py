"""Finding sites: a probe forward shows which linears of a decoder layer read the same tensor."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..config import MoeLoraConfig
from ..core.model import evaluating
from ..host_internals import FAKE_TENSOR_LOG, FakeTensorMode, buffers_of
from .targets import decoder_layer, features, find_targets, layer_number

NOT_CALLED = "its forward is not called (the base reads its weight directly)"


def find_sites(
    model: PreTrainedModel, config: MoeLoraConfig, is_classifier: bool, unadapted: dict[str, str]
) -> list[list[str]]:
    """Group the target linears that read the same tensor in one decoder layer.

    `unadapted` is filled with what a shorthand like "all-linear" met and could not adapt, and why.
    """
    targets, named = find_targets(model, config, is_classifier)
    layers = {name: decoder_layer(model, name) for name in targets}
    inputs = probe_inputs(model, targets)
    usable = {}
    for name in targets:
        reason = _why_not(name, inputs, layers[name], config)
        if reason is None:
            usable[name] = inputs[name]
        elif named:
            raise ValueError(f"target_modules names {name!r}, which cannot be adapted: {reason}.")
        else:
            unadapted[name] = reason
    if not usable:
        raise ValueError(f"No target module can be adapted: {unadapted}.")
    if config.router_scope == "projection":
        return [[name] for name in usable]
    groups: dict[tuple[str | None, int], list[str]] = {}
    for name, tensor in usable.items():
        groups.setdefault((layers[name], id(tensor)), []).append(name)
    return list(groups.values())


def check_sites(model: PreTrainedModel, sites: list[list[str]]) -> None:
    """Raise ValueError where a checkpoint's sites name what `model` has not."""
    modules = dict(model.named_modules())
    for name in (name for names in sites for name in names):
        if name not in modules or features(modules[name]) is None:
            raise ValueError(
                f"The checkpoint's experts belong to {name!r}, which is not a linear of this "
                f"{type(model).__name__}."
            )


def probe_inputs(model: PreTrainedModel, targets: dict[str, nn.Module]) -> dict[str, Tensor]:
    """The first input of each target that a forward pass of two tokens calls.

    Under `FakeTensorMode`: nothing is computed, and real and meta weights work alike. An operator
    without a fake implementation (grouped MoE kernels in fp32) is met by a real forward, where the
    weights are real; so is a base that accelerate moves between devices, whose hooks know no fake
    weights.
    """
    dispatched = any(hasattr(module, "_hf_hook") for module in model.modules())
    if not dispatched:
        try:
            with (
                _quiet(),
                FakeTensorMode(allow_non_fake_inputs=True),
                _recording(model, targets) as inputs,
            ):
                _forward_two_tokens(model)
            return inputs
        except Exception:
            if model.device.type == "meta":
                raise
    with _recording(model, targets) as inputs:
        _forward_two_tokens(model)
    return inputs


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep torch from logging the traceback of an operator without a fake implementation."""
    log = logging.getLogger(FAKE_TENSOR_LOG)
    before = log.disabled
    log.disabled = True
    try:
        yield
    finally:
        log.disabled = before


@contextmanager
def _recording(model: nn.Module, targets: dict[str, nn.Module]) -> Iterator[dict[str, Tensor]]:
    """Record the first input of each target; afterwards buffers and training mode are as before."""
    inputs: dict[str, Tensor] = {}
    handles = [m.register_forward_pre_hook(_Recorder(name, inputs)) for name, m in targets.items()]
    buffers = [(module, dict(buffers_of(module))) for module in model.modules()]
    try:
        with torch.no_grad(), evaluating(model):
            yield inputs
    finally:
        for handle in handles:
            handle.remove()
        for module, before in buffers:
            buffers_of(module).update(before)


class _Recorder:
    def __init__(self, name: str, inputs: dict[str, Tensor]):
        self.name = name
        self.inputs = inputs

    def __call__(self, module: nn.Module, args: tuple) -> None:
        # Keeping the tensor keeps its id from being used again.
        self.inputs.setdefault(self.name, args[0])


def _forward_two_tokens(model: PreTrainedModel) -> None:
    ids = torch.zeros(1, 2, dtype=torch.long, device=device_of(model))
    parameters = inspect.signature(model.forward).parameters
    keywords: dict[str, Any] = {"use_cache": False} if "use_cache" in parameters else {}
    if "decoder_input_ids" in parameters:
        keywords["decoder_input_ids"] = ids
    model(input_ids=ids, **keywords)


def _why_not(
    name: str, inputs: dict[str, Tensor], layer: str | None, config: MoeLoraConfig
) -> str | None:
    """Why target `name` cannot be adapted, or None."""
    if name not in inputs:
        return NOT_CALLED
    if config.router_scope not in ("layer", "model"):
        return None
    if layer is None:
        return (
            f"it lies outside of the decoder layers, which router_scope={config.router_scope!r} "
            "routes"
        )
    if config.router_scope == "model" and (layer_number(layer) or 0) < config.router_layer:
        return (
            f"it lies before router_layer={config.router_layer}, whose input the model's router "
            "reads"
        )
    return None


def device_of(module: nn.Module) -> torch.device:
    """Where `module` computes: its weights' device, or where accelerate brings them."""
    for part in module.modules():
        execution_device = getattr(getattr(part, "_hf_hook", None), "execution_device", None)
        if execution_device is not None:
            return torch.device(execution_device)
    return next(module.parameters()).device
