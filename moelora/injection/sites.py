"""Which linears of a base are adapted, by PEFT's tables and rules, and which of them are one site:
a probe forward shows which linears of a decoder layer read the same tensor.
"""

from __future__ import annotations

import difflib
import inspect
import logging
import warnings
from collections.abc import Iterator
from functools import partial
from typing import Any

import peft
import torch
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as PEFT_TARGETS
from peft.utils.constants import SEQ_CLS_HEAD_NAMES
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..config import MoeLoraConfig
from ..host_internals import (
    FAKE_TENSOR_LOG,
    Convolution,
    FakeTensorMode,
    check_mamba_targets,
    in_out_features,
    include_all_linear,
    is_partitioned,
)
from .base import snapshot
from .left_out import (
    FUSED,
    check_all_match,
    fused_experts,
    report_fused,
    why_not_called,
    with_ancestors,
)

ALL_LINEAR = "all-linear"


def find_sites(
    model: PreTrainedModel, config: MoeLoraConfig, is_classifier: bool, unadapted: dict[str, str]
) -> list[list[str]]:
    """Group the target linears that read the same tensor in one decoder layer.

    `unadapted` is filled with what a shorthand like "all-linear" met and could not adapt, and why.
    """
    targets, named = find_targets(model, config, is_classifier)
    inputs = probe_inputs(model, with_ancestors(model, targets))
    groups: dict[tuple, list[str]] = {}
    for name in targets:
        layer = decoder_layer(model, name)
        called = name in inputs
        reason = _why_not_routed(layer, config) if called else why_not_called(name, inputs)
        if reason is None:
            alone = name if config.router_scope == "projection" else None
            groups.setdefault((layer, id(inputs[name]), alone), []).append(name)
        elif named:
            raise ValueError(f"target_modules names {name!r}, which cannot be adapted: {reason}.")
        else:
            unadapted[name] = reason
    if not named:
        fused = fused_experts(model)
        unadapted |= dict.fromkeys(fused, FUSED)
        report_fused(model, fused)
    if not groups:
        raise ValueError(f"No target module can be adapted: {unadapted}.")
    return list(groups.values())


def probe_inputs(model: PreTrainedModel, targets: dict[str, nn.Module]) -> dict[str, Tensor]:
    """The first input of each of these modules that a forward pass of two tokens calls; the base
    stays as it was.

    Under `FakeTensorMode`: nothing is computed, and real and meta weights work alike. An operator
    without a fake implementation (grouped MoE kernels in fp32) is met by a real forward, where the
    weights are real; so is a base that accelerate moves between devices, whose hooks know no fake
    weights.
    """
    if any(is_partitioned(parameter) for parameter in model.parameters()):
        # DeepSpeed has no whole weights here outside of its own engine: the same modules do.
        with torch.device("meta"):
            model = type(model)(model.config)
        targets = {name: model.get_submodule(name) for name in targets}
    if not any(hasattr(module, "_hf_hook") for module in model.modules()):
        # It would print the traceback of an operator without a fake implementation.
        log = logging.getLogger(FAKE_TENSOR_LOG)
        was_disabled = log.disabled
        log.disabled = True
        try:
            with FakeTensorMode(allow_non_fake_inputs=True):
                return _forward_two_tokens(model, targets)
        except Exception:
            if model.device.type == "meta":
                raise
        finally:
            log.disabled = was_disabled
    return _forward_two_tokens(model, targets)


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


def _record(inputs: dict[str, Any], name: str, module: nn.Module, args: tuple) -> None:
    # Keeping the tensor keeps its id from being used again.
    inputs.setdefault(name, args[0] if args else None)


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


def find_targets(
    model: PreTrainedModel, config: MoeLoraConfig, is_classifier: bool
) -> tuple[dict[str, nn.Module], bool]:
    """The modules to adapt, by name in the model's order, and whether the user named them.

    Raises:
        ValueError: nothing matches (with the nearest names), or a named module is not a linear.
    """
    targets = config.target_modules
    if targets is None:
        targets = PEFT_TARGETS.get(model.config.model_type, ALL_LINEAR)
    all_linear = isinstance(targets, str) and targets.lower() == ALL_LINEAR
    named = config.target_modules is not None and not all_linear
    # PEFT refuses layers_to_transform beside the shorthand; here both together mean what they say.
    layers = config.layers_to_transform
    wanted = {layers} if isinstance(layers, int) else set(layers or [])
    lora = peft.LoraConfig(
        target_modules=targets,
        layers_to_transform=None if all_linear else layers,
        modules_to_save=modules_to_save(model, config, is_classifier) or None,
        task_type="SEQ_CLS" if is_classifier else "CAUSAL_LM",
    )
    include_all_linear(lora, model)
    targeted = {}
    for name, module in model.named_modules():
        if not name or not check_target_module_exists(lora, name):
            continue
        if all_linear and wanted and layer_number(decoder_layer(model, name)) not in wanted:
            continue
        try:
            if features(module) is None:
                raise ValueError(
                    f"target_modules matches {name!r}, a {type(module).__name__}: only linear "
                    "layers (also Conv1D and quantised ones) can carry LoRA experts. Name its "
                    "linears, or use a narrower regex."
                )
            check_mamba_targets(lora, model, name.rpartition(".")[2])
            targeted[name] = module
        except ValueError:
            if named:
                raise
    if not targeted:
        raise ValueError(_nothing_matched(model, config))
    if isinstance(config.target_modules, list):
        check_all_match(model, config.target_modules)
    return targeted, named


def features(module: nn.Module) -> tuple[int, int] | None:
    """(d_in, d_out) of a linear, a Conv1D or a quantised linear; None for anything else."""
    if isinstance(module, (nn.Embedding, Convolution)):
        return None
    with warnings.catch_warnings():
        # PEFT warns where it answers None, which the caller handles.
        warnings.simplefilter("ignore", UserWarning)
        d_in, d_out = in_out_features(module)
    return (d_in, d_out) if d_in is not None and d_out is not None else None


def decoder_layer(model: nn.Module, name: str) -> str | None:
    """The path of the outermost numbered block around module `name`, or None outside of any."""
    parts = name.split(".")
    for i in range(1, len(parts)):
        around = ".".join(parts[:i])
        if parts[i].isdigit() and isinstance(model.get_submodule(around), nn.ModuleList):
            return f"{around}.{parts[i]}"
    return None


def layer_number(layer: str | None) -> int | None:
    """The number at the end of a decoder layer's path; None outside of any."""
    return None if layer is None else int(layer.rpartition(".")[2])


def modules_to_save(
    model: PreTrainedModel, config: MoeLoraConfig, is_classifier: bool
) -> list[str]:
    """The base's modules that train: the configured ones, else a classifier's head."""
    if config.modules_to_save is not None:
        return list(config.modules_to_save)
    return [n for n in SEQ_CLS_HEAD_NAMES if is_classifier and hasattr(model, n)]


def saved_modules(
    model: PreTrainedModel, config: MoeLoraConfig, is_classifier: bool
) -> Iterator[nn.Module]:
    """The modules that `modules_to_save` names, whole or by their end; ValueError for none."""
    for name in modules_to_save(model, config, is_classifier):
        matches = [m for path, m in model.named_modules() if f".{path}".endswith(f".{name}")]
        if not matches:
            raise ValueError(
                f"modules_to_save names {name!r}, which is in no {type(model).__name__}. Its "
                f"parts are called: {', '.join(n for n, _ in model.named_children())}."
            )
        yield from matches


def _nothing_matched(model: PreTrainedModel, config: MoeLoraConfig) -> str:
    linears = [n for n, m in model.named_modules() if features(m) is not None]
    ends = sorted({n.rpartition(".")[2] for n in linears})
    asked = config.target_modules
    words = [asked] if isinstance(asked, str) else list(asked or [])
    near = [n for w in words for n in difflib.get_close_matches(w, ends, n=3, cutoff=0.3)]
    layers = config.layers_to_transform
    where = "" if layers is None else f" in layers {layers}"
    return (
        f"target_modules={asked!r}{where} matches no module of {type(model).__name__}. "
        f"Nearest names: {', '.join(near) or 'none'}. Its linears are called: {', '.join(ends)}."
    )
