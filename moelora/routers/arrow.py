"""The router of Arrow: how strongly the input points along each expert's direction."""

from __future__ import annotations

from torch import Tensor

from .registry import register_router
from .top_k import TopKRouter


@register_router("arrow")
class ArrowRouter(TopKRouter):
    """|x Wᵀ|: rows are directions without a sign, as singular vectors are (arXiv:2405.11157)."""

    def score(self, x: Tensor) -> Tensor:
        """|x Wᵀ|: x `[N, d]` → `[N, num_choices]`."""
        return super().score(x).abs()
