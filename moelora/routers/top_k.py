"""Linear routers: those of Mixtral, and Arrow's, whose rows are directions without a sign."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from ..config import MoeLoraConfig
from .base import Router, register_router
from .products import product


@register_router("top_k")
class TopKRouter(Router):
    """Linear scores, softmax over all experts, the top k renormalised (Mixtral, arXiv:2401.04088).

    logits = x Wᵀ, W `[num_choices, d]`.
    """

    fills_every_slot = True
    takes_any_dtype = True
    expert_rows: ClassVar[frozenset[str]] = frozenset({"weight"})

    def __init__(self, config: MoeLoraConfig, in_features: int):
        super().__init__(config, in_features)
        self.weight = nn.Parameter(torch.empty(config.num_choices, in_features))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw small random rows: with equal ones every token would go to the first experts, since
        top-k breaks ties so.
        """
        nn.init.normal_(self.weight, std=self.in_features**-0.5)

    def score(self, x: Tensor) -> Tensor:
        """x Wᵀ: x `[N, d]` → `[N, num_choices]`."""
        return self.product(x, self.weight)

    def product(self, x: Tensor, rows: Tensor) -> Tensor:
        """x rowsᵀ in fp32 (float64 stays), exact also where x has 16 bits.

        Args:
            x: `[N, d]` of any dtype.
            rows: `[m, d]`, as logits are made with.
        """
        return product(x, rows, self.backend)


@register_router("arrow")
class ArrowRouter(TopKRouter):
    """|x Wᵀ|: rows are directions without a sign, as singular vectors are (arXiv:2405.11157)."""

    def score(self, x: Tensor) -> Tensor:
        """|x Wᵀ|: x `[N, d]` → `[N, num_choices]`."""
        return super().score(x).abs()
