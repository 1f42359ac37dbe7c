"""Which modules of a base are adapted: PEFT's tables and rules, errors with the nearest names."""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Iterator

import peft
from peft.tuners.tuners_utils import BaseTunerLayer, check_target_module_exists
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as PEFT_TARGETS
from peft.utils.constants import SEQ_CLS_HEAD_NAMES
from torch import nn
from transformers import PreTrainedModel

from ..config import MoeLoraConfig
from ..host_internals import Convolution, check_mamba_targets, in_out_features, include_all_linear

ALL_LINEAR = "all-linear"


def find_targets(
    model: PreTrainedModel, config: MoeLoraConfig, is_classifier: bool
) -> tuple[dict[str, nn.Module], bool]:
    """The modules to adapt, by name in the model's order, and whether the user named them.

    Raises:
        ValueError: nothing matches (with the nearest names), or a named module is not a linear.
    """
    targets = config.target_modules
    if isinstance(targets, str) and targets.lower() == ALL_LINEAR:
        targets = ALL_LINEAR
    named = targets is not None and targets != ALL_LINEAR
    if targets is None:
        targets = PEFT_TARGETS.get(model.config.model_type, ALL_LINEAR)
    lora = peft.LoraConfig(
        target_modules=targets,
        layers_to_transform=config.layers_to_transform if targets != ALL_LINEAR else None,
        modules_to_save=modules_to_save(model, config, is_classifier) or None,
        task_type="SEQ_CLS" if is_classifier else "CAUSAL_LM",
    )
    targeted = _match(model, lora, refuse=named)
    if targets == ALL_LINEAR and config.layers_to_transform is not None:
        # PEFT refuses layers_to_transform beside the shorthand; here both together mean what they
        # say.
        layers = config.layers_to_transform
        wanted = {layers} if isinstance(layers, int) else set(layers)
        targeted = {
            name: module
            for name, module in targeted.items()
            if layer_number(decoder_layer(model, name)) in wanted
        }
    if not targeted:
        raise ValueError(_nothing_matched(model, config))
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
        if parts[i].isdigit() and isinstance(
            model.get_submodule(".".join(parts[:i])), nn.ModuleList
        ):
            return ".".join(parts[: i + 1])
    return None


def layer_number(layer: str | None) -> int | None:
    """The number at the end of a decoder layer's path; None outside of any."""
    return None if layer is None else int(layer.rpartition(".")[2])


def has_peft_layers(model: nn.Module) -> bool:
    """Whether PEFT has put adapters into `model`."""
    return any(isinstance(module, BaseTunerLayer) for module in model.modules())


def modules_to_save(
    model: PreTrainedModel, config: MoeLoraConfig, is_classifier: bool
) -> list[str]:
    """The base's modules that train: the configured ones, else a classifier's head."""
    if config.modules_to_save is not None:
        return list(config.modules_to_save)
    return [n for n in SEQ_CLS_HEAD_NAMES if is_classifier and hasattr(model, n)]


def saved_modules(
    model: PreTrainedModel, config: MoeLoraConfig, is_classifier: bool
) -> Iterator[tuple[str, nn.Module]]:
    """The modules that `modules_to_save` names, whole or by their end; ValueError for none."""
    for name in modules_to_save(model, config, is_classifier):
        matches = [
            (path, module)
            for path, module in model.named_modules()
            if path == name or path.endswith("." + name)
        ]
        if not matches:
            raise ValueError(
                f"modules_to_save names {name!r}, which matches no module of "
                f"{type(model).__name__}. "
                f"Its parts are called: {', '.join(n for n, _ in model.named_children())}."
            )
        yield from matches


def _match(model: PreTrainedModel, lora: peft.LoraConfig, refuse: bool) -> dict[str, nn.Module]:
    """What `lora` names in `model`, without what PEFT refuses; `refuse` raises instead."""
    include_all_linear(lora, model)
    targeted = {}
    for name, module in model.named_modules():
        if not name or not check_target_module_exists(lora, name):
            continue
        if features(module) is None:
            if not refuse:
                continue
            raise ValueError(
                f"target_modules matches {name!r}, a {type(module).__name__}: only linear layers "
                "(also Conv1D and "
                "quantised ones) can carry LoRA experts. Name its linears, or use a narrower regex."
            )
        try:
            check_mamba_targets(lora, model, name.rpartition(".")[2])
        except ValueError:
            if refuse:
                raise
            continue
        targeted[name] = module
    return targeted


def _nothing_matched(model: PreTrainedModel, config: MoeLoraConfig) -> str:
    linears = [n for n, m in model.named_modules() if features(m) is not None]
    ends = sorted({n.rpartition(".")[2] for n in linears})
    asked = config.target_modules
    words = [asked] if isinstance(asked, str) else list(asked or [])
    near = [n for w in words for n in difflib.get_close_matches(w, ends, n=3, cutoff=0.3)]
    where = (
        f" in layers {config.layers_to_transform}" if config.layers_to_transform is not None else ""
    )
    return (
        f"target_modules={asked!r}{where} matches no module of {type(model).__name__}. "
        f"Nearest names: {', '.join(near) or 'none'}. Its linears are called: {', '.join(ends)}."
    )
