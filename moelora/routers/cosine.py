"""A router that compares directions in a space of few dimensions."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..config import MoeLoraConfig
from ..validation import MAX_WIDTH, check_integer, check_number
from .base import Router, register_router
from .products import product

MAX_SCALE = 100.0


@register_router("cosine")
class CosineRouter(Router):
    """cos(P x, e) / τ with each expert's embedding e, against the collapse of what routers read
    (X-MoE, arXiv:2204.09179).

    P `[hidden_size, d]`, e `[num_choices, hidden_size]` and log 1/τ `[1]` train; 1/τ stays below
    100. How long x is does not matter.
    """

    @dataclass(frozen=True)
    class Options(Router.Options):
        """Settings of router="cosine".

        Args:
            hidden_size: how many dimensions are compared; the paper has half as many as experts.
            temperature: τ at the beginning, at least 0.01.
        """

        hidden_size: int = 16
        temperature: float = 0.3

        def __post_init__(self) -> None:
            check_integer("router_options['hidden_size']", self.hidden_size, 1, MAX_WIDTH)
            name = "router_options['temperature']"
            check_number(name, self.temperature, 1 / MAX_SCALE, math.inf)

    options: Options
    fills_every_slot = True
    expert_rows: ClassVar[frozenset[str]] = frozenset({"embeddings"})
    shared_parameters = Router.shared_parameters | {"projection", "log_scale"}

    def __init__(self, config: MoeLoraConfig, in_features: int):
        super().__init__(config, in_features)
        width = self.options.hidden_size
        self.projection = nn.Parameter(torch.empty(width, in_features))
        self.embeddings = nn.Parameter(torch.empty(config.num_choices, width))
        self.log_scale = nn.Parameter(torch.tensor([-math.log(self.options.temperature)]))
        nn.init.normal_(self.projection, std=in_features**-0.5)
        nn.init.normal_(self.embeddings, std=width**-0.5)

    def score(self, x: Tensor) -> Tensor:
        """cos(P x, e) / τ: x `[N, d]` → `[N, num_choices]`."""
        projected = product(x, self.projection, self.backend)
        embeddings = nn.functional.normalize(self.embeddings.to(x.dtype), dim=-1)
        scale = self.log_scale.to(x.dtype).clamp(max=math.log(MAX_SCALE)).exp()
        directions = nn.functional.normalize(projected, dim=-1)
        return product(directions, embeddings * scale, self.backend)
