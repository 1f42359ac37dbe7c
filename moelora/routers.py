"""Routers: from hidden states to the experts that act, `[T, d] → Routing`, always in fp32."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from moelora_kernels import router_logits
from torch import Tensor, nn

from .config import MoeLoraConfig


class Routing(NamedTuple):
    """What a router decided for N rows (tokens, or sequences at sequence level).

    logits: `[N, E]` fp32, before the softmax.
    expert_ids: `[N, K]` int64, −1 for no expert in this slot.
    expert_weights: `[N, K]` fp32.
    """

    logits: Tensor
    expert_ids: Tensor
    expert_weights: Tensor


ROUTERS: dict[str, type[Router]] = {}


def register_router(name: str) -> Callable[[type[Router]], type[Router]]:
    """Class decorator that makes a `Router` available as `MoeLoraConfig(router=name)`.

    Raises:
        ValueError: the name is taken by another class.
        TypeError: the class is no `Router`.
    """

    def register(cls: type[Router]) -> type[Router]:
        if not (isinstance(cls, type) and issubclass(cls, Router)):
            raise TypeError(f"@register_router({name!r}) takes a subclass of Router, not {cls!r}.")
        taken = ROUTERS.get(name)
        # A module that is imported twice (a notebook cell run again) may replace itself.
        if taken is not None and (taken.__module__, taken.__qualname__) != (cls.__module__, cls.__qualname__):
            raise ValueError(f"The router name {name!r} is taken by {taken.__module__}.{taken.__qualname__}.")
        ROUTERS[name] = cls
        return cls

    return register


class Router(nn.Module):
    """Base class: `forward(x [N, d]) → Routing` for `config.num_experts` experts.

    A subclass implements `score`, and `select` where it chooses otherwise. Parameters are bare
    `nn.Parameter`s (no `nn.Linear` inside, which PEFT's "all-linear" would adapt).
    fills_every_slot: it never leaves a slot empty (−1) nor names an expert twice in a row, which spares every
    plan to look. takes_any_dtype: `score` reads x as it comes, and computes in fp32 all the same.
    backend: of `moelora_kernels`, as in `Mixture`.
    """

    fills_every_slot = False
    takes_any_dtype = False
    backend: str | None = None

    def __init__(self, config: MoeLoraConfig, in_features: int):
        super().__init__()
        self.num_experts = config.num_experts
        self.num_experts_per_tok = config.num_experts_per_tok
        self.norm_topk_prob = config.norm_topk_prob and config.num_experts_per_tok > 1
        self.jitter_noise = config.router_jitter_noise
        self.in_features = in_features

    def score(self, x: Tensor) -> Tensor:
        """Logits `[N, E]` fp32 of x `[N, d]` fp32 (of any dtype, with takes_any_dtype)."""
        raise NotImplementedError

    def select(self, logits: Tensor, selection_bias: Tensor | None) -> Routing:
        """The `num_experts_per_tok` experts of the largest probability, with those probabilities as weights.

        `selection_bias` `[E]` shifts which experts are chosen, never their weights (arXiv:2408.15664).
        """
        if self.norm_topk_prob and selection_bias is None:
            # The same numbers as below with fewer operations: the softmax's own denominator cancels.
            top, ids = logits.topk(self.num_experts_per_tok, dim=-1)
            return Routing(logits, ids, top.softmax(-1))
        probabilities = logits.softmax(-1)
        scores = probabilities if selection_bias is None else probabilities + selection_bias
        ids = scores.topk(self.num_experts_per_tok, dim=-1).indices
        weights = probabilities.gather(-1, ids)
        if self.norm_topk_prob:
            weights = weights / weights.sum(-1, keepdim=True)
        return Routing(logits, ids, weights)

    def forward(self, x: Tensor, selection_bias: Tensor | None = None) -> Routing:
        """Route x `[N, d]` of any dtype; under autocast too in fp32."""
        if torch.is_autocast_enabled(x.device.type):
            with torch.autocast(x.device.type, enabled=False):
                return self.forward(x, selection_bias)
        jitters = self.training and self.jitter_noise > 0
        if x.dtype != torch.float64 and (jitters or not self.takes_any_dtype):
            x = x.float()
        if jitters:
            noise = torch.empty_like(x).uniform_(1 - self.jitter_noise, 1 + self.jitter_noise)
            x = x * noise
        return self.select(self.score(x), selection_bias)


@register_router("top_k")
class TopKRouter(Router):
    """Linear scores, softmax over all experts, the top k renormalised (Mixtral, arXiv:2401.04088).

    logits = x Wᵀ, W `[E, d]`.
    """

    fills_every_slot = True
    takes_any_dtype = True

    def __init__(self, config: MoeLoraConfig, in_features: int):
        super().__init__(config, in_features)
        self.weight = nn.Parameter(torch.empty(config.num_experts, in_features))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Small random rows: equal ones would send every token to the first experts by the tie rule of top-k."""
        nn.init.normal_(self.weight, std=self.in_features**-0.5)

    def score(self, x: Tensor) -> Tensor:
        """x Wᵀ: x `[N, d]` → `[N, E]`."""
        weight = self.weight.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
        if x.dtype == weight.dtype and x.device.type == "cpu":
            return nn.functional.linear(x, weight)  # the same, with less around it
        return router_logits(x, weight, backend=self.backend)


@register_router("arrow")
class ArrowRouter(TopKRouter):
    """|x Wᵀ|: rows are directions without a sign, as singular vectors are (arXiv:2405.11157)."""

    def score(self, x: Tensor) -> Tensor:
        """|x Wᵀ|: x `[N, d]` → `[N, E]`."""
        return super().score(x).abs()
