"""Top-k routers that explore: their scores carry learned noise while they train."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from ..config import MoeLoraConfig
from .base import Routing, register_router
from .top_k import TopKRouter


@register_router("noisy_top_k")
class NoisyTopKRouter(TopKRouter):
    """Top-k of x Wᵀ + N(0, 1) · softplus(x W_noiseᵀ) while training (arXiv:1701.06538, eq. 3–5).

    The paper has softmax after the top k are kept, as `norm_topk_prob` does. W_noise
    `[num_choices, d]` begins at 0, so the noise begins with the deviation log 2. In evaluation
    there is none, and the router is `top_k`. The router losses read the noisy logits, of which the
    experts were chosen.
    """

    expert_rows: ClassVar[frozenset[str]] = TopKRouter.expert_rows | {"noise_weight"}

    def __init__(self, config: MoeLoraConfig, in_features: int):
        super().__init__(config, in_features)
        self.noise_weight = nn.Parameter(torch.zeros(config.num_choices, in_features))

    def select(self, x: Tensor, logits: Tensor, selection_bias: Tensor | None) -> Routing:
        """The top k of the noisy logits, which the routing holds; see `Router.select`."""
        if self.training:
            # The generator is the device's own: checkpointing restores it for the recomputation.
            deviation = nn.functional.softplus(self.product(x, self.noise_weight))
            logits = logits + torch.randn_like(logits) * deviation
        return super().select(x, logits, selection_bias)
