"""Experts to be: fresh ones, copies of others, and PEFT adapters, described before anything
changes.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..adapters.composing import adapter_factors
from ..adapters.merging import seeded
from ..config import MoeLoraConfig
from ..core.experts import LoraFactors
from ..core.model import MixtureModel
from ..validation import check_integer, check_number


@dataclass
class Newcomer:
    """An expert to be.

    Attributes:
        r: its usual rank.
        lora_alpha: its usual alpha.
        factors: its factors by the linear's full name, where it is there.
        original: the number of the expert that it is a copy of, or None.
    """

    r: int
    lora_alpha: float
    factors: dict[str, LoraFactors]
    original: int | None = None


def newcomer(
    model: MixtureModel,
    *,
    adapter: Any = None,
    copy_of: str | None = None,
    noise: float = 0.0,
    r: int | None = None,
    lora_alpha: float | None = None,
    seed: int | None = None,
    allow_base_mismatch: bool = False,
) -> Newcomer:
    """The expert that these arguments of `add_expert` describe; the model is only read.

    Args:
        model: the model that the expert is for.
        adapter: a source of `read_adapter`.
        copy_of: the name of the expert to copy.
        noise: of the copy, in standard deviations of each factor.
        r: the rank of a fresh expert; by default the others' most common one.
        lora_alpha: the alpha of a fresh expert; by default the others' most common one.
        seed: for the fresh A, or the noise.
        allow_base_mismatch: the adapter may name another base.

    Raises:
        ValueError, TypeError: arguments that contradict each other or are out of range, an unknown
            original, or an adapter that does not fit.
    """
    if adapter is not None and copy_of is not None:
        raise ValueError(
            "adapter and copy_of exclude each other: an expert comes from one of them."
        )
    check_number("noise", noise, 0.0, math.inf)
    if noise and copy_of is None:
        raise ValueError(
            f"noise={noise} is added to a copy: name its original with copy_of, or drop it."
        )
    if (r, lora_alpha) != (None, None) and (adapter is not None or copy_of is not None):
        raise ValueError(
            "r and lora_alpha are for a fresh expert; an adapter or a copy brings its own: drop "
            "them."
        )
    generator = seeded(seed)
    if adapter is not None:
        return _imported(model, adapter, allow_base_mismatch)
    if copy_of is not None:
        return _copied(model, model.moelora_config.expert_index(copy_of), noise, generator)
    return _fresh(model, r, lora_alpha, generator)


def _fresh(
    model: MixtureModel, r: int | None, alpha: float | None, generator: torch.Generator | None
) -> Newcomer:
    config: MoeLoraConfig = model.moelora_config
    usual = Counter(zip(config.ranks, config._per_expert("lora_alpha"))).most_common(1)[0][0]
    r = usual[0] if r is None else r
    alpha = usual[1] if alpha is None else alpha
    check_integer("r", r, 1)
    check_number("lora_alpha", alpha, 0.0, math.inf, open_low=True)
    scaling = alpha / (math.sqrt(r) if config.use_rslora else r)
    factors = {}
    for linear, like in model.moelora.expert(0).items():
        d_in = like.A.shape[1]
        bound = 1 / math.sqrt(d_in)
        # Drawn on the CPU: one seed gives the same expert on every device.
        A = torch.empty(r, d_in, dtype=like.A.dtype).uniform_(-bound, bound, generator=generator)
        B = like.B.new_zeros(r, like.B.shape[1])
        factors[linear] = LoraFactors(A.to(like.A.device), B, scaling)
    return Newcomer(r, alpha, factors)


def _copied(
    model: MixtureModel, expert: int, noise: float, generator: torch.Generator | None
) -> Newcomer:
    config: MoeLoraConfig = model.moelora_config

    def noisy(block: Tensor) -> Tensor:
        block = block.detach().clone()
        if not noise or not block.numel():
            return block
        drawn = torch.randn(block.shape, generator=generator, dtype=block.dtype).to(block.device)
        return block + noise * block.std(correction=0) * drawn

    factors = {
        linear: LoraFactors(noisy(own.A), noisy(own.B), own.scaling)
        for linear, own in model.moelora.expert(expert).items()
    }
    return Newcomer(config.ranks[expert], config._per_expert("lora_alpha")[expert], factors, expert)


def _imported(model: MixtureModel, adapter: Any, allow_base_mismatch: bool) -> Newcomer:
    factors = adapter_factors(adapter, model, allow_base_mismatch=allow_base_mismatch)
    adapted = model.moelora.expert(0)
    if unknown := [linear for linear in factors if linear not in adapted]:
        raise ValueError(
            f"The adapter adapts {', '.join(unknown[:5])} ({len(unknown)} in all), which this "
            "mixture does not: compose it with from_adapters, or begin with a mixture whose "
            "target_modules has them."
        )
    r = Counter(len(own.A) for own in factors.values()).most_common(1)[0][0]
    usual = Counter(own.scaling for own in factors.values() if len(own.A) == r).most_common(1)[0][0]
    alpha = usual * (math.sqrt(r) if model.moelora_config.use_rslora else r)
    # A scaling that no alpha gives is listed linear by linear.
    return Newcomer(r, alpha if alpha > 0 else r, factors)
