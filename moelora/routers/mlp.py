"""Routers of one hidden layer."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from ..config import MoeLoraConfig
from .base import HiddenSize, Router, register_router
from .products import product


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
        hidden = product(x, self.hidden_weight, self.backend) + self.hidden_bias.to(x.dtype)
        return product(nn.functional.gelu(hidden), self.weight, self.backend)
