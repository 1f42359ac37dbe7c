"""Experts out: one expert or a fixed mixture as a stock PEFT LoRA folder, or merged into the plain
base.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..injection.targets import features
from ..validation import check_integer
from .deltas import Delta, adapted, compress, distance, expert_deltas, wide
from .merging import RECIPES, MergeReport, check_weights, merged_deltas, recipe_options
from .writing import check_folder, write_adapter

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class ExpertExport:
    """The part of a model with a mixture inside that gives its experts away."""

    def export_expert(
        self,
        name: str,
        folder: str | PathLike[str],
        *,
        dtype: torch.dtype | None = None,
        overwrite: bool = False,
    ) -> None:
        """Write one expert as a LoRA folder that `PeftModel.from_pretrained(base, folder)` loads to
        its logits.

        Its A, B and trained head keep their bits; `dtype` casts A and B. Atomic: the folder is
        there as a whole or not at all. overwrite: replace a folder that holds an adapter.

        Raises:
            ValueError, TypeError: no such expert, one without any rank or with NaN, or no dtype of
            floats.
            FileExistsError: the folder is not empty. OSError: it cannot be written.
        """
        _check_dtype(dtype)
        deltas = expert_deltas(self, name)
        if not deltas:
            raise ValueError(
                f"The expert {name!r} has rank 0 in every linear: there is nothing to export."
            )
        write_adapter(self, deltas, folder, dtype=dtype, overwrite=overwrite)

    def export_merged(
        self,
        weights: Mapping[str, float],
        folder: str | PathLike[str],
        *,
        rank: int | None = None,
        dtype: torch.dtype | None = None,
        recipe: str = "linear",
        overwrite: bool = False,
        **options: Any,
    ) -> MergeReport:
        """Write a fixed mixture of experts as one LoRA folder for PEFT; as `use_experts(weights)`
        by default.

        rank: None writes what the recipe makes, by concatenation along rank; else the best
        approximation of this rank. recipe, options: one of `merging.RECIPES` and what it takes
        (density, seed …); those that make no low rank (ties, dare_linear, dare_ties, breadcrumbs)
        need `rank`, and a full SVD for each linear.

        Raises:
            ValueError, TypeError: weights of no or unknown experts or not finite, a rank out of
            range, an unknown
                recipe or option. FileExistsError, OSError: as `export_expert`.
        """
        weights = check_weights(self, weights)
        _check_dtype(dtype)
        if recipe == "svd":
            options = {"rank": rank, **options}
        options = recipe_options(recipe, options)
        _check_rank(self, rank, recipe)
        check_folder(folder, overwrite)
        if recipe == "svd":
            # The error is to be that of the approximation, so approximate after the exact sum.
            made = merged_deltas(self, weights, "linear", {})
        else:
            made = merged_deltas(self, weights, recipe, options)
        deltas, errors, squares = {}, {}, [0.0, 0.0]
        for linear, product in made:
            if rank is None and isinstance(product, Tensor):
                raise ValueError(
                    f"The recipe {recipe!r} makes no low rank: pass rank=… for the LoRA's."
                )
            delta = (
                product
                if rank is None and isinstance(product, Delta)
                else compress(product, rank or 0)
            )
            deltas[linear] = _cast(delta, dtype or _master_dtype(self))
            off, norm = distance(product, deltas[linear])
            errors[linear] = off / norm if norm else 0.0
            squares = [squares[0] + off**2, squares[1] + norm**2]
        if not deltas:
            raise ValueError(
                f"The experts {', '.join(weights)} have rank 0 in every linear: nothing to export."
            )
        write_adapter(self, deltas, folder, dtype=dtype, overwrite=overwrite)
        error = (squares[0] / squares[1]) ** 0.5 if squares[1] else 0.0
        return MergeReport(recipe, weights, {n: d.rank for n, d in deltas.items()}, errors, error)

    def merge_and_unload(
        self, weights: Mapping[str, float], *, recipe: str = "linear", **options: Any
    ) -> PreTrainedModel:
        """Merge a fixed mixture into the base's weights, in place, and return the plain base
        without the mixture.

        Sums are in float64 and cast once. Until the last linear is merged the weights before are
        kept (in host memory), so that nothing is changed where one fails. recipe, options: as
        `export_merged`.

        Raises:
            ValueError, TypeError: as `export_merged`; or a linear that is quantised, offloaded or
            tied, or whose
                merged weights the base's dtype cannot hold.
        """
        weights = check_weights(self, weights)
        options = recipe_options(recipe, options)
        if "rank" in options:
            _check_rank(self, options["rank"], recipe)
        linears = {name: self.get_submodule(name) for name in adapted(self)}  # type: ignore[attr-defined]
        _check_mergeable(self, linears)
        with _restored_on_error() as before, torch.no_grad():
            for name, product in merged_deltas(self, weights, recipe, options):
                weight = linears[name].weight
                before.append((weight, weight.to("cpu", copy=True)))
                weight.copy_(_merged(name, linears[name], product))
        return self.unload()  # type: ignore[attr-defined]


def _merged(name: str, linear: Any, product: Delta | Tensor) -> Tensor:
    """The linear's weight with ΔW added, in its own layout and dtype."""
    if isinstance(product, Delta):
        product = Delta(wide(product.A), wide(product.B), product.scaling).full()
    delta = wide(product).T if isinstance(linear, Conv1D) else wide(product)
    merged = (wide(linear.weight) + delta.to(linear.weight.device)).to(linear.weight.dtype)
    if not bool(merged.isfinite().all()):
        raise ValueError(
            f"Merging makes weights of {name} that are not finite in {merged.dtype}: the experts hold NaN or Inf, or "
            "their weights are too large. Nothing was changed."
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


def _check_mergeable(model: Any, linears: Mapping[str, nn.Module]) -> None:
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
                f"a quantised {type(linear).__name__}, whose codes cannot hold the sum: load the base without "
                "quantisation, or use export_merged"
            )
        elif weight.device.type == "meta":
            reason = (
                "offloaded: load the base without a device_map that offloads, or use export_merged"
            )
        elif owners[id(weight)] > 1:
            reason = "tied to another module's weight, which would change too: untie it, or use export_merged"
        else:
            continue
        raise ValueError(f"Nothing was merged: {name} is {reason}.")


def _check_dtype(dtype: Any) -> None:
    if dtype is not None and dtype not in DTYPES:
        raise TypeError(f"dtype={dtype!r}: expected one of {', '.join(map(str, DTYPES))}, or None.")


def _check_rank(model: Any, rank: int | None, recipe: str) -> None:
    """Raise unless some linear can have a LoRA of this rank, or None where the recipe needs none."""
    if rank is None:
        if "rank" in inspect.signature(RECIPES[recipe]).parameters:
            raise ValueError(f"The recipe {recipe!r} needs rank=…, the rank of what it makes.")
        return
    check_integer("rank", rank, 1)
    modules = [model.get_submodule(name) for name in adapted(model)]
    largest = max(min(size) for size in map(features, modules) if size is not None)
    if rank > largest:
        raise ValueError(
            f"rank={rank} is more than any adapted linear can have: expected at most {largest}."
        )


def _master_dtype(model: Any) -> torch.dtype:
    return next(iter(model.moelora.factors())).stacked().dtype


def _cast(delta: Delta, dtype: torch.dtype) -> Delta:
    return Delta(delta.A.to("cpu", dtype), delta.B.to("cpu", dtype), delta.scaling)
