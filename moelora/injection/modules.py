"""What a module of a base is called, of what sizes, in which decoder layer, on which device."""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from ..host_internals import Convolution, in_out_features
from ..placement import ends_of


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


def is_in_layers(model: nn.Module, name: str, layers: int | Sequence[int] | None) -> bool:
    """Whether module `name` is in one of these decoder layers; None and none are all."""
    wanted = [layers] if isinstance(layers, int) else layers
    return not wanted or layer_number(decoder_layer(model, name)) in wanted


def ending_in(model: nn.Module, end: str) -> dict[str, nn.Module]:
    """The modules whose full name is `end` or ends in it, by their full names."""
    return {name: m for name, m in model.named_modules() if f".{name}".endswith(f".{end}")}


def nearest(words: Iterable[str], names: Iterable[str]) -> str:
    """A sentence for messages: which last parts of `names` are most like `words`."""
    ends = sorted({name.rpartition(".")[2] for name in names})
    near = [n for w in words for n in difflib.get_close_matches(w, ends, n=3, cutoff=0.3)]
    return f"Nearest names: {', '.join(near) or 'none'}."


def depth_of(model: nn.Module, layer: str | None) -> float:
    """Where a decoder layer is: 0 the first, 1 the last; 1 outside of any."""
    if layer is None:
        return 1.0
    around, _, number = layer.rpartition(".")
    layers: Any = model.get_submodule(around)
    return int(number) / max(len(layers) - 1, 1)


def device_of(module: nn.Module) -> torch.device:
    """Where `module` computes: its weights' device, or where accelerate brings them."""
    for part in module.modules():
        execution_device = getattr(getattr(part, "_hf_hook", None), "execution_device", None)
        if execution_device is not None:
            return torch.device(execution_device)
    return next(module.parameters()).device


def site_device(model: nn.Module, names: Sequence[str]) -> torch.device:
    """Where the site of the places `names` computes."""
    return device_of(model.get_submodule(ends_of(names[0])[1]))
