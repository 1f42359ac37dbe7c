"""Finding sites: a probe forward shows which linears of a decoder layer read the same tensor."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from itertools import chain

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..config import MoeLoraConfig
from ..host_internals import FAKE_TENSOR_LOG, FakeTensorMode
from .targets import decoder_layer, features, find_targets, layer_number
from .undo import snapshot

NOT_CALLED = "its forward is not called (the base reads its weight directly)"


def find_sites(
    model: PreTrainedModel, config: MoeLoraConfig, is_classifier: bool, unadapted: dict[str, str]
) -> list[list[str]]:
    """Group the target linears that read the same tensor in one decoder layer.

    `unadapted` is filled with what a shorthand like "all-linear" met and could not adapt, and why.
    """
    targets, named = find_targets(model, config, is_classifier)
    inputs = probe_inputs(model, targets)
    groups: dict[tuple, list[str]] = {}
    for name in targets:
        layer = decoder_layer(model, name)
        reason = NOT_CALLED if name not in inputs else _why_not_routed(layer, config)
        if reason is None:
            alone = name if config.router_scope == "projection" else None
            groups.setdefault((layer, id(inputs[name]), alone), []).append(name)
        elif named:
            raise ValueError(f"target_modules names {name!r}, which cannot be adapted: {reason}.")
        else:
            unadapted[name] = reason
    if not groups:
        raise ValueError(f"No target module can be adapted: {unadapted}.")
    return list(groups.values())


def check_sites(model: PreTrainedModel, sites: list[list[str]]) -> None:
    """Raise ValueError where a checkpoint's sites name what `model` has not."""
    modules = dict(model.named_modules())
    for name in chain.from_iterable(sites):
        if name not in modules or features(modules[name]) is None:
            raise ValueError(
                f"The checkpoint's experts belong to {name!r}, which is not a linear of this "
                f"{type(model).__name__}."
            )


def probe_inputs(model: PreTrainedModel, targets: dict[str, nn.Module]) -> dict[str, Tensor]:
    """The first input of each target that a forward pass of two tokens calls; the base stays as it
    was.

    Under `FakeTensorMode`: nothing is computed, and real and meta weights work alike. An operator
    without a fake implementation (grouped MoE kernels in fp32) is met by a real forward, where the
    weights are real; so is a base that accelerate moves between devices, whose hooks know no fake
    weights.
    """
    dispatched = any(hasattr(module, "_hf_hook") for module in model.modules())
    if not dispatched:
        try:
            with _quiet(), FakeTensorMode(allow_non_fake_inputs=True):
                return _forward_two_tokens(model, targets)
        except Exception:
            if model.device.type == "meta":
                raise
    return _forward_two_tokens(model, targets)


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


@torch.no_grad()
def _forward_two_tokens(model: PreTrainedModel, targets: dict[str, nn.Module]) -> dict[str, Tensor]:
    ids = torch.zeros(1, 2, dtype=torch.long, device=device_of(model))
    keywords = {"use_cache": False, "decoder_input_ids": ids}
    taken = inspect.signature(model.forward).parameters
    inputs: dict[str, Tensor] = {}
    restore = snapshot(model)
    try:
        for name, module in targets.items():
            module.register_forward_pre_hook(partial(_record, inputs, name))
        model.eval()
        model(input_ids=ids, **{k: v for k, v in keywords.items() if k in taken})
    finally:
        restore()
    return inputs


def _record(inputs: dict[str, Tensor], name: str, module: nn.Module, args: tuple) -> None:
    # Keeping the tensor keeps its id from being used again.
    inputs.setdefault(name, args[0])


def _why_not_routed(layer: str | None, config: MoeLoraConfig) -> str | None:
    """Why a linear of this decoder layer has no router in the configured scope, or None."""
    scope = config.router_scope
    if scope in ("layer", "model") and layer is None:
        return f"it lies outside of the decoder layers, which router_scope={scope!r} routes"
    if scope == "model" and (layer_number(layer) or 0) < config.router_layer:
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
