"""One trained LoRA as several experts, which together give back exactly what it adds."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from ..core.expert_init import ROW_NORM
from ..core.experts import LoraFactors
from ..validation import check_choice, check_number
from .merging import seeded, singular_directions, wide
from .reading import DTYPES, Adapter, Target, read_adapter

METHODS = ("copy", "svd")
NOISE = 0.01
# The factors of every expert in one linear, by its name: A `[r_e, d_in]` and B `[d_out, r_e]`.
Parts = Callable[[str], Sequence[tuple[Tensor, Tensor]]]


def split_adapter(
    source: Any,
    names: Sequence[str],
    method: str,
    *,
    noise: float | None = None,
    seed: int | None = None,
) -> dict[str, Adapter]:
    """One adapter as E experts, sources for `from_adapters` and `add_expert`.

    "copy": each is the adapter. So that they do not stay alike, A_e = M_e A and B_e = B M_e⁻¹ with
    M_e = exp(noise · G / √r), G a Gaussian matrix: in every one of them B_e A_e = B A, to rounding.
    Weights that add up to 1 give the adapter back, so any routing with `norm_topk_prob` of two or
    more experts a token. (Trained mixtures begin with copies in sparse upcycling,
    arXiv:2212.05055.)

    "svd": B A = U S Vᵀ, whose r directions are dealt out in turns: expert e has the numbers e,
    e + E, …, and the scaling s·E. So the sum with weights 1/E is the adapter, to rounding; what a
    router chooses of it is not. Rows of A are as long as the adapter's on average.

    Args:
        source: what `read_adapter` takes.
        names: of the experts.
        method: "copy" or "svd".
        noise: of "copy", 0.01 by default; with 0 all are the same bits.
        seed: of the noise.

    Raises:
        ValueError, TypeError: an unknown method, noise that is negative or for "svd", a linear with
            fewer directions than experts, or a source that cannot be read.
    """
    check_choice("split", method, METHODS)
    if method == "svd" and (noise, seed) != (None, None):
        raise ValueError("noise and seed are for split='copy', not 'svd': leave them out.")
    noise = NOISE if noise is None else noise
    check_number("noise", noise, 0.0, 1.0)
    whole = read_adapter(source)
    if whole.problems:
        return dict.fromkeys(names, whole)
    if method == "svd":
        _check_directions(whole, len(names))
        parts = partial(_directions, whole, len(names))
    else:
        drawn = _changes_of_basis(whole, len(names), noise, seeded(seed))
        parts = partial(_copies, whole, drawn)
    # Read once to be checked, and once for each expert to be put in.
    kept: Parts = lru_cache(maxsize=None)(parts)
    return {name: _part(whole, kept, e, len(names), method) for e, name in enumerate(names)}


def _part(whole: Adapter, parts: Parts, expert: int, experts: int, method: str) -> Adapter:
    """Expert number `expert` as an adapter."""
    targets = {}
    for linear, target in whole.targets.items():
        r = target.r
        scaling = target.scaling
        if method == "svd":
            r = len(range(expert, _number_of_directions(target), experts))
            scaling = target.scaling * experts
        shapes = ((r, target.a_shape[1]), (target.b_shape[0], r))
        nbytes = sum(map(math.prod, shapes)) * _dtype(target).itemsize
        dtypes = frozenset([DTYPES[_dtype(target)]])
        targets[linear] = Target(r, scaling, *shapes, dtypes, nbytes)

    def read(keys: list[str]) -> list[Tensor]:
        tensors = []
        for key in keys:
            linear, _, factor = key.rpartition(".")
            if factor in ("lora_A", "lora_B") and linear in targets:
                tensors.append(parts(linear)[expert][factor == "lora_B"])
            else:
                tensors.append(whole.saved_tensor(key))
        return tensors

    keys = {f"{linear}.lora_{x}": f"{linear}.lora_{x}" for linear in targets for x in "AB"}
    keys |= {name: name for name in whole.saved}
    return replace(whole, targets=targets, problems=[], _keys=keys, _read=read)


def _dtype(target: Target) -> torch.dtype:
    """What the factors of an expert are kept in: fp32, or float64 of an adapter in that."""
    return torch.float64 if "F64" in target.dtypes else torch.float32


def _number_of_directions(target: Target) -> int:
    """The largest rank that B A can have."""
    return min(target.r, target.a_shape[1], target.b_shape[0])


def _check_directions(whole: Adapter, experts: int) -> None:
    """Raise ValueError where an expert would have nothing in a linear."""
    counts = {linear: _number_of_directions(target) for linear, target in whole.targets.items()}
    few = {linear: count for linear, count in counts.items() if count < experts}
    if few:
        linear, r = next(iter(few.items()))
        raise ValueError(
            f"split='svd' deals out the adapter's directions, of which {linear} has {r} "
            f"for {experts} experts ({len(few)} such linears): use num_experts of at most "
            f"{min(few.values())}, or split='copy'."
        )


def _changes_of_basis(
    whole: Adapter, experts: int, noise: float, generator: torch.Generator | None
) -> dict[str, Tensor]:
    """noise · G / √r for each expert and linear, `[E, r, r]` float64."""
    drawn = {}
    for linear, target in whole.targets.items():
        shape = (experts, target.r, target.r)
        random = torch.randn(shape, generator=generator, dtype=torch.float64)
        drawn[linear] = random * (noise / math.sqrt(target.r))
    return drawn


def _copies(
    whole: Adapter, exponents: dict[str, Tensor], linear: str
) -> list[tuple[Tensor, Tensor]]:
    A, B = (factor.cpu() for factor in whole.factors(linear))
    dtype = _dtype(whole.targets[linear])
    if not exponents[linear].any():
        return [(A.to(dtype), B.to(dtype))] * len(exponents[linear])
    pairs = zip(exponents[linear].matrix_exp(), (-exponents[linear]).matrix_exp())
    return [((M @ A.double()).to(dtype), (B.double() @ inverse).to(dtype)) for M, inverse in pairs]


def _directions(whole: Adapter, experts: int, linear: str) -> list[tuple[Tensor, Tensor]]:
    A, B = (factor.cpu() for factor in whole.factors(linear))
    dtype = _dtype(whole.targets[linear])
    U, S, Vh = singular_directions(LoraFactors(wide(A), wide(B).T, 1.0))
    # Not √S on both sides: where S is 0 neither of two zeros would have a gradient.
    length = float(wide(A).square().sum(1).mean().sqrt()) or ROW_NORM
    A = (length * Vh).to(dtype)
    B = (U * (S / length)).to(dtype)
    return [(A[e::experts], B[:, e::experts]) for e in range(experts)]
