"""Routers that choose the experts of the largest scores: linear ones (Mixtral's), linear ones
without a sign (Arrow's), and those of one hidden layer.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from moelora_kernels import router_logits
from torch import Tensor, nn

from ..config import MoeLoraConfig
from .base import HiddenSize, Router, register_router


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
        weight = self.weight.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
        if x.dtype == weight.dtype and x.device.type == "cpu":
            return nn.functional.linear(x, weight)  # the same, with less around it
        return router_logits(x, weight, backend=self.backend)


@register_router("arrow")
class ArrowRouter(TopKRouter):
    """|x Wᵀ|: rows are directions without a sign, as singular vectors are (arXiv:2405.11157)."""

    def score(self, x: Tensor) -> Tensor:
        """|x Wᵀ|: x `[N, d]` → `[N, num_choices]`."""
        return super().score(x).abs()


@register_router("mlp")
class MlpRouter(Router):
    """W₂ gelu(W₁ x + b): one hidden layer of H = `hidden_size` units under the scores of `top_k`.

    W₁ `[H, d]`, b `[H]`, W₂ `[num_choices, H]`.
    """

    Options = HiddenSize
    options: HiddenSize
    fills_every_slot = True
    expert_rows: ClassVar[frozenset[str]] = frozenset({"weight"})
    shared_parameters = Router.shared_parameters | {"hidden_weight", "hidden_bias"}

    def __init__(self, config: MoeLoraConfig, in_features: int):
        super().__init__(config, in_features)
        width = self.options.hidden_size
        self.hidden_weight = nn.Parameter(torch.empty(width, in_features))
        self.hidden_bias = nn.Parameter(torch.zeros(width))
        self.weight = nn.Parameter(torch.empty(config.num_choices, width))
        nn.init.normal_(self.hidden_weight, std=in_features**-0.5)
        nn.init.normal_(self.weight, std=width**-0.5)

    def score(self, x: Tensor) -> Tensor:
        """W₂ gelu(W₁ x + b): x `[N, d]` → `[N, num_choices]`."""
        hidden = x @ self.hidden_weight.to(x.dtype).T + self.hidden_bias.to(x.dtype)
        return nn.functional.gelu(hidden) @ self.weight.to(x.dtype).T
