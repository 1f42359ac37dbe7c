"""Experts out: one expert, or a fixed mixture of several, as a stock PEFT LoRA folder."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from os import PathLike
from typing import Any

import torch
from torch import Tensor

from ..core.experts import LoraFactors
from ..core.model import MixtureModel
from ..injection.sites import features
from ..validation import check_integer
from .deltas import compress, distance, expert_deltas
from .merging import RECIPES, MergeReport, check_weights, merged_deltas, recipe_options
from .writing import check_folder, write_adapter

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


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
    if not deltas:
        raise ValueError(
            f"The expert {name!r} has rank 0 in every linear: there is nothing to export."
        )
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
    weights = check_weights(model, weights)
    _check_dtype(dtype)
    if recipe == "svd":
        options = {"rank": rank, **options}
    options = recipe_options(recipe, options)
    check_rank(model, rank, recipe)
    check_folder(folder, overwrite)
    exact = ("linear", {}) if recipe == "svd" else (recipe, options)
    written_dtype = dtype or next(iter(model.moelora.expert(0).values())).A.dtype
    deltas = {}
    errors = {}
    square_error = square_norm = 0.0
    # For svd the sum is exact and compressed here, so that the error is the approximation's.
    for linear, delta in merged_deltas(model, weights, *exact):
        deltas[linear] = _low_rank(delta, rank, recipe, written_dtype)
        off, norm = distance(delta, deltas[linear])
        errors[linear] = off / norm if norm else 0.0
        square_error += off**2
        square_norm += norm**2
    if not deltas:
        raise ValueError(
            f"The experts {', '.join(weights)} have rank 0 in every linear: nothing to export."
        )
    write_adapter(model, deltas, folder, dtype=dtype, overwrite=overwrite)
    ranks = {linear: len(factors.A) for linear, factors in deltas.items()}
    error = (square_error / square_norm) ** 0.5 if square_norm else 0.0
    return MergeReport(recipe, weights, ranks, errors, error)


def check_rank(model: MixtureModel, rank: int | None, recipe: str) -> None:
    """Raise unless a linear can have a LoRA of this rank, or None where the recipe needs none."""
    if rank is None:
        if "rank" in inspect.signature(RECIPES[recipe]).parameters:
            raise ValueError(f"The recipe {recipe!r} needs rank=…, the rank of its result.")
        return
    check_integer("rank", rank, 1)
    modules = [model.get_submodule(linear) for linear in model.moelora.expert(0)]
    largest = max(min(size) for size in map(features, modules) if size is not None)
    if rank > largest:
        raise ValueError(
            f"rank={rank} is more than any adapted linear can have: expected at most {largest}."
        )


def _low_rank(
    delta: LoraFactors | Tensor, rank: int | None, recipe: str, dtype: torch.dtype
) -> LoraFactors:
    """What is written of a merged ΔW: factors of `dtype` on the CPU, of at most this rank."""
    if rank is not None:
        delta = compress(delta, rank)
    elif isinstance(delta, Tensor):
        raise ValueError(
            f"The recipe {recipe!r} does not give a low rank: pass rank=… for the LoRA's."
        )
    return LoraFactors(delta.A.to("cpu", dtype), delta.B.to("cpu", dtype), delta.scaling)


def _check_dtype(dtype: Any) -> None:
    if dtype is not None and dtype not in DTYPES:
        raise TypeError(f"dtype={dtype!r}: expected one of {', '.join(map(str, DTYPES))}, or None.")
