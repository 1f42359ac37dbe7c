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

from ..config import MoeLoraConfig
from ..validation import check_integer, check_number


@dataclass
class Newcomer:
    """An expert to be: its usual r and lora_alpha, and where it is there, its factors by the
    linear's name.

    factors: A `[r, d_in]`, B `[r, d_out]` and scaling. like: the number of the expert that it is a
    copy of.
    """

    r: int
    lora_alpha: float
    factors: dict[str, tuple[Tensor, Tensor, float]]
    like: int | None = None


def newcomer(
    model: Any,
    adapter: Any,
    copy_of: str | None,
    noise: float,
    r: int | None,
    lora_alpha: float | None,
    seed: int | None,
    allow_base_mismatch: bool,
) -> Newcomer:
    """The expert that these arguments of `ExpertPool.add_expert` describe; the model is only read.

    Raises:
        ValueError, TypeError: arguments at odds or out of range, an unknown original, an adapter
        that does not fit.
    """
    if adapter is not None and copy_of is not None:
        raise ValueError(
            "adapter and copy_of exclude each other: an expert is made of one of them."
        )
    check_number("noise", noise, 0.0, math.inf)
    if noise and copy_of is None:
        raise ValueError(
            f"noise={noise} is added to a copy: name its original with copy_of, or drop it."
        )
    if (r, lora_alpha) != (None, None) and (adapter is not None or copy_of is not None):
        raise ValueError(
            "r and lora_alpha are for a fresh expert; an adapter or a copy brings its own: drop them."
        )
    if seed is not None:
        check_integer("seed", seed, 0)
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    if adapter is not None:
        return _imported(model, adapter, allow_base_mismatch)
    if copy_of is not None:
        return _copied(model, model.moelora_config.expert_index(copy_of), noise, generator)
    return _fresh(model, r, lora_alpha, generator)


def _fresh(
    model: Any, r: int | None, alpha: float | None, generator: torch.Generator | None
) -> Newcomer:
    config: MoeLoraConfig = model.moelora_config
    usual = Counter(zip(config.ranks, config._per_expert("lora_alpha"))).most_common(1)[0][0]
    r, alpha = usual[0] if r is None else r, usual[1] if alpha is None else alpha
    check_integer("r", r, 1)
    check_number("lora_alpha", alpha, 0.0, math.inf, open_low=True)
    scaling = alpha / (math.sqrt(r) if config.use_rslora else r)
    factors = {}
    for site in model.moelora.sites.values():
        bound = 1 / math.sqrt(site.in_features)
        for name, linear in zip(site.names, site.linears):
            like = linear.lora_B.stacked().detach()
            # Drawn on the CPU: one seed gives the same expert on every device.
            A = torch.empty(r, site.in_features, dtype=like.dtype).uniform_(
                -bound, bound, generator=generator
            )
            factors[name] = (A.to(like.device), like.new_zeros(r, like.shape[1]), scaling)
    return Newcomer(r, alpha, factors)


def _copied(model: Any, expert: int, noise: float, generator: torch.Generator | None) -> Newcomer:
    config: MoeLoraConfig = model.moelora_config

    def noisy(block: Tensor) -> Tensor:
        block = block.detach().clone()
        if not noise or not block.numel():
            return block
        drawn = torch.randn(block.shape, generator=generator, dtype=block.dtype).to(block.device)
        return block + noise * block.std(correction=0) * drawn

    factors = {}
    for site in model.moelora.sites.values():
        whole = site.lora_A.stacked()
        for name, linear, rows in zip(site.names, site.linears, site.lora_A.expert_rows(expert)):
            B = linear.lora_B.stacked()[linear.lora_B.expert_rows(expert)[0]]
            factors[name] = (noisy(whole[rows]), noisy(B), config.scaling_of(name)[expert])
    return Newcomer(config.ranks[expert], config._per_expert("lora_alpha")[expert], factors, expert)


def _imported(model: Any, adapter: Any, allow_base_mismatch: bool) -> Newcomer:
    from ..adapters.composing import factors_of

    factors = factors_of(adapter, model, allow_base_mismatch=allow_base_mismatch)
    adapted = {name for site in model.moelora.sites.values() for name in site.names}
    if unknown := [name for name in factors if name not in adapted]:
        raise ValueError(
            f"The adapter adapts {', '.join(unknown[:5])} ({len(unknown)} in all), which this mixture does not: "
            "compose it with from_adapters, or begin with a mixture whose target_modules has them."
        )
    r = Counter(len(A) for A, _, _ in factors.values()).most_common(1)[0][0]
    usual = Counter(s for A, _, s in factors.values() if len(A) == r).most_common(1)[0][0]
    alpha = usual * (math.sqrt(r) if model.moelora_config.use_rslora else r)
    # A scaling that no alpha gives is listed linear by linear.
    return Newcomer(r, alpha if alpha > 0 else r, factors)
