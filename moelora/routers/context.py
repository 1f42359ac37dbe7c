"""A router that reads what an outside system says of each sequence, and no hidden states."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..config import MoeLoraConfig
from ..validation import MAX_WIDTH, check_integer
from .base import Router, register_router
from .products import product


@register_router("context")
class ContextRouter(Router):
    """Noisy top-k of an outside context vector c, `router_context` of forward and generate.

    logits = c W_gᵀ + N(0, 1) · softplus(c W_noiseᵀ), the noise in training alone
    (arXiv:1701.06538, eq. 4); then as `top_k`. With `hidden_size` H the first term is
    W_g gelu(W₁ c + b). All tokens of a sequence have its choice, at either routing level. With five
    experts of rank 64, two of which act, router_scope="model" and c a description of a sub-network
    it is the shape-aware mixture of LoRAs of AmoebaLLM (arXiv:2411.10606).

    W_g `[num_choices, n or H]`, W_noise `[num_choices, n]`, zeros at first; W₁ `[H, n]`, b `[H]`.
    """

    @dataclass(frozen=True)
    class Options:
        """Settings of router="context".

        Args:
            context_size: the width n of the context vector.
            hidden_size: the number of hidden units, or 0 for a linear router.
            noise: add noise in training, whose size is learned.
        """

        context_size: int = 16
        hidden_size: int = 0
        noise: bool = True

        def __post_init__(self) -> None:
            check_integer("router_options['context_size']", self.context_size, 1, MAX_WIDTH)
            check_integer("router_options['hidden_size']", self.hidden_size, 0, MAX_WIDTH)

    options: Options
    reads: ClassVar[str] = "context"
    fills_every_slot = True
    expert_rows: ClassVar[frozenset[str]] = frozenset({"weight", "noise_weight"})
    shared_parameters = Router.shared_parameters | {"hidden_weight", "hidden_bias"}

    def __init__(self, config: MoeLoraConfig, in_features: int):
        # Not the hidden states' width.
        options = self.read_options(config.router_options)
        super().__init__(config, options.context_size)
        width = options.hidden_size or self.in_features
        if options.hidden_size:
            self.hidden_weight = nn.Parameter(torch.empty(width, self.in_features))
            self.hidden_bias = nn.Parameter(torch.zeros(width))
            nn.init.normal_(self.hidden_weight, std=self.in_features**-0.5)
        self.weight = nn.Parameter(torch.empty(self.num_choices, width))
        nn.init.normal_(self.weight, std=width**-0.5)
        if options.noise:
            self.noise_weight = nn.Parameter(torch.zeros(self.num_choices, self.in_features))
        else:
            self.expert_rows = frozenset({"weight"})  # type: ignore[misc]

    def score(self, x: Tensor) -> Tensor:
        """The logits, in training with noise: contexts `[N, n]` → `[N, num_choices]`."""
        hidden = x
        if self.options.hidden_size:
            hidden = product(x, self.hidden_weight, self.backend) + self.hidden_bias.to(x.dtype)
            hidden = nn.functional.gelu(hidden)
        logits = product(hidden, self.weight, self.backend)
        if not (self.training and self.options.noise):
            return logits
        size = nn.functional.softplus(product(x, self.noise_weight, self.backend))
        return logits + torch.randn_like(logits) * size
