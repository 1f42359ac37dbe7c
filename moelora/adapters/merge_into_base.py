"""A fixed mixture of experts merged into the plain base's own weights."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..core.experts import LoraFactors
from ..core.model import MixtureModel
from ..injection.sites import features
from .deltas import product, wide
from .export import DTYPES, check_rank
from .merging import check_weights, merged_deltas, recipe_options


def merge_into_base(
    model: MixtureModel, weights: Mapping[str, float], recipe: str, options: Mapping[str, Any]
) -> None:
    """Add a fixed mixture to the base's weights, in place; the mixture is still there, and has to
    be taken out with `unload()`. See `MoeLoraForCausalLM.merge_and_unload`.
    """
    weights = check_weights(model, weights)
    options = recipe_options(recipe, options)
    if "rank" in options:
        check_rank(model, options["rank"], recipe)
    linears = {name: model.get_submodule(name) for name in model.moelora.expert(0)}
    _check_mergeable(model, linears)
    with _restored_on_error() as before, torch.no_grad():
        for name, delta in merged_deltas(model, weights, recipe, options):
            weight = linears[name].get_parameter("weight")
            before.append((weight, weight.to("cpu", copy=True)))
            weight.copy_(_merged(name, linears[name], delta))


def _merged(name: str, linear: nn.Module, delta: LoraFactors | Tensor) -> Tensor:
    """The linear's weight with ΔW added, in its own layout and dtype."""
    weight = linear.get_parameter("weight")
    if isinstance(delta, LoraFactors):
        delta = product(LoraFactors(wide(delta.A), wide(delta.B), delta.scaling))
    delta = wide(delta).T if isinstance(linear, Conv1D) else wide(delta)
    merged = (wide(weight) + delta.to(weight.device)).to(weight.dtype)
    if not bool(merged.isfinite().all()):
        raise ValueError(
            f"Merging makes weights of {name} that are not finite in {merged.dtype}: the experts "
            "hold NaN or Inf, or their weights are too large. Nothing was changed."
        )
    return merged


@contextmanager
def _restored_on_error() -> Iterator[list[tuple[Tensor, Tensor]]]:
    """A list of weights and their copies from before; on an error inside they are copied back."""
    before: list[tuple[Tensor, Tensor]] = []
    try:
        yield before
    except BaseException:
        with torch.no_grad():
            for weight, copy in before:
                weight.copy_(copy)
        raise


def _check_mergeable(model: MixtureModel, linears: Mapping[str, nn.Module]) -> None:
    """Raise ValueError where a weight is not plain numbers that belong to its linear alone."""
    owners = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    for name, linear in linears.items():
        weight: Any = getattr(linear, "weight", None)
        size = features(linear) or (0, 0)
        layout = size if isinstance(linear, Conv1D) else size[::-1]
        # Quantised weights are of a class of their own, of integers or of another shape.
        plain = type(weight) in (Tensor, nn.Parameter) and weight.dtype in DTYPES
        if not plain or tuple(weight.shape) != layout:
            reason = (
                f"a quantised {type(linear).__name__}, whose codes cannot hold the sum: load the "
                "base without quantisation, or use export_merged"
            )
        elif weight.device.type == "meta":
            reason = (
                "offloaded: load the base without a device_map that offloads, or use export_merged"
            )
        elif owners[id(weight)] > 1:
            reason = (
                "tied to another module's weight, which would change too: untie it, or use "
                "export_merged"
            )
        else:
            continue
        raise ValueError(f"Nothing was merged: {name} is {reason}.")
