"""Experts out: one expert, or a fixed mixture of several, as a stock PEFT LoRA folder or in the
plain base's own weights.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..core.experts import LoraFactors
from ..core.model import MixtureModel
from ..injection.modules import features
from ..validation import check_integer
from .merging import check_merge, compress, distance, expert_deltas, merged_deltas, product, wide
from .reading import DTYPES
from .writing import check_folder, write_adapter


@dataclass(frozen=True)
class MergeReport:
    """What `export_merged` wrote, and how far each linear's ΔW' is from the recipe's ΔW.

    An error is ‖ΔW' - ΔW‖ / ‖ΔW‖ in Frobenius norms, measured on what was written: it includes the
    rounding to the written dtype (about 1e-8 in fp32).

    Attributes:
        recipe: the recipe's name.
        weights: the weight of each expert, by its name.
        ranks: the rank that was written, by the linear's name.
        errors: the error by the linear's name.
        error: the error over all linears together.
    """

    recipe: str
    weights: dict[str, float]
    ranks: dict[str, int]
    errors: dict[str, float]
    error: float

    def __str__(self) -> str:
        low = min(self.ranks.values())
        high = max(self.ranks.values())
        ranks = f"rank {high}" if low == high else f"ranks {low} to {high}"
        worst = max(self.errors, key=self.errors.__getitem__)
        return (
            f"{self.recipe} of {len(self.weights)} experts: {ranks} in {len(self.ranks)} linears, "
            f"relative error {self.error:.2g} (largest {self.errors[worst]:.2g}, in {worst})"
        )


def export_expert(
    model: MixtureModel,
    name: str,
    folder: str | PathLike[str],
    *,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
) -> None:
    """Write one expert as a LoRA folder; see `MoeLoraForCausalLM.export_expert`."""
    _check_dtype(dtype)
    deltas = expert_deltas(model, name)
    write_adapter(model, deltas, folder, dtype=dtype, overwrite=overwrite)


def export_merged(
    model: MixtureModel,
    weights: Mapping[str, float],
    folder: str | PathLike[str],
    *,
    rank: int | None = None,
    dtype: torch.dtype | None = None,
    recipe: str = "linear",
    overwrite: bool = False,
    **options: Any,
) -> MergeReport:
    """Write a fixed mixture of experts as a LoRA folder; see `MoeLoraForCausalLM.export_merged`."""
    own = {"rank": rank, **options} if recipe == "svd" else options
    weights = check_merge(model, weights, recipe, own)
    _check_dtype(dtype)
    _check_rank(model, rank)
    check_folder(folder, overwrite)
    # The sum is exact and compressed here, so that the error is the approximation's.
    exact = "linear" if recipe == "svd" else recipe
    written_dtype = dtype or next(iter(model.moelora.expert(0).values())).A.dtype
    deltas = {}
    norms = {}
    for linear, delta in merged_deltas(model, weights, exact, options):
        low = delta if rank is None else compress(delta, rank)
        if isinstance(low, Tensor):
            raise ValueError(
                f"The recipe {recipe!r} does not give a low rank: pass rank=… for the LoRA's."
            )
        low = LoraFactors(low.A.to(written_dtype), low.B.to(written_dtype), low.scaling)
        norms[linear] = distance(delta, low)
        deltas[linear] = LoraFactors(low.A.cpu(), low.B.cpu(), low.scaling)
    write_adapter(model, deltas, folder, dtype=dtype, overwrite=overwrite)
    ranks = {linear: len(factors.A) for linear, factors in deltas.items()}
    errors = {linear: off / norm if norm else 0.0 for linear, (off, norm) in norms.items()}
    off, norm = (math.hypot(*sizes) for sizes in zip(*norms.values()))
    return MergeReport(recipe, weights, ranks, errors, off / norm if norm else 0.0)


@torch.no_grad()
def merge_into_base(
    model: MixtureModel, weights: Mapping[str, float], recipe: str, options: Mapping[str, Any]
) -> None:
    """Add a fixed mixture to the base's weights, in place; the mixture is still there, and has to
    be taken out with `unload()`. See `MoeLoraForCausalLM.merge_and_unload`.
    """
    weights = check_merge(model, weights, recipe, options)
    _check_rank(model, options.get("rank"))
    linears = {name: model.get_submodule(name) for name in model.moelora.expert(0)}
    _check_mergeable(model, linears)
    before: list[tuple[Tensor, Tensor]] = []
    try:
        for name, delta in merged_deltas(model, weights, recipe, options):
            weight = linears[name].get_parameter("weight")
            if isinstance(delta, LoraFactors):
                delta = product(LoraFactors(wide(delta.A), wide(delta.B), delta.scaling))
            delta = wide(delta).T if isinstance(linears[name], Conv1D) else wide(delta)
            merged = (wide(weight) + delta.to(weight.device)).to(weight.dtype)
            if not bool(merged.isfinite().all()):
                raise ValueError(
                    f"Merging makes weights of {name} that are not finite in {merged.dtype}: the "
                    "experts hold NaN or Inf, or have too large weights. Nothing was changed."
                )
            before.append((weight, weight.to("cpu", copy=True)))
            weight.copy_(merged)
    except BaseException:
        for weight, copy in before:
            weight.copy_(copy)
        raise


def _check_rank(model: MixtureModel, rank: int | None) -> None:
    if rank is None:
        return
    check_integer("rank", rank, 1)
    sizes = [(own.A.shape[1], own.B.shape[1]) for own in model.moelora.expert(0).values()]
    largest = max(map(min, sizes))
    if rank > largest:
        raise ValueError(
            f"rank={rank} is more than any adapted linear can have: expected at most {largest}."
        )


def _check_dtype(dtype: Any) -> None:
    if dtype is not None and dtype not in DTYPES:
        raise TypeError(f"dtype={dtype!r}: expected one of {', '.join(map(str, DTYPES))}, or None.")


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
                "base without quantisation"
            )
        elif weight.device.type == "meta":
            reason = "offloaded: load the base without a device_map that offloads"
        elif owners[id(weight)] > 1:
            reason = "tied to another module's weight, which would change too: untie it"
        else:
            continue
        raise ValueError(f"Nothing was merged: {name} is {reason}, or use export_merged.")
