"""Routers: from hidden states to the experts that act, `[T, d] → Routing`, always in fp32."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from moelora_kernels import router_logits
from torch import Tensor, nn

from .config import MoeLoraConfig


class Routing(NamedTuple):
    """What a router decided for N rows (tokens, or sequences at sequence level).

    logits: `[N, E]` fp32, before the softmax; −inf for an expert that is banned.
    expert_ids: `[N, K]` int64, −1 for no expert in this slot.
    expert_weights: `[N, K]` fp32.
    """

    logits: Tensor
    expert_ids: Tensor
    expert_weights: Tensor

    def without(self, banned: Tensor) -> Routing:
        """The same with every slot of an expert that is banned (`[E]` bool) left empty."""
        empty = banned[self.expert_ids.clamp(min=0)] | (self.expert_ids < 0)
        return self._replace(
            expert_ids=self.expert_ids.masked_fill(empty, -1),
            expert_weights=self.expert_weights.masked_fill(empty, 0.0),
        )


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

    A subclass implements `score`, `select` where it chooses otherwise, and `resize` where experts that come and
    go change more than the rows of its parameters. Parameters are bare
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

    @torch.no_grad()
    def resize(self, keep: Sequence[int | None]) -> None:
        """Become a router of `len(keep)` experts: number i is the former number `keep[i]`, or None, a new one.

        Every parameter and buffer whose first dimension is the number of experts is re-indexed; a new expert's
        row is the mean of the rows that are kept. A router that keeps its experts otherwise overrides this.
        """
        kept = [i for i in keep if i is not None]
        for name, tensor in [*self.named_parameters(), *self.named_buffers()]:
            if not tensor.dim() or tensor.shape[0] != self.num_experts:
                continue
            new = tensor[kept].mean(0) if tensor.is_floating_point() and kept else torch.zeros_like(tensor[0])
            made = torch.stack([new if i is None else tensor[i] for i in keep])
            owner, _, leaf = name.rpartition(".")
            if isinstance(tensor, nn.Parameter):
                made = nn.Parameter(made, requires_grad=tensor.requires_grad)
            setattr(self.get_submodule(owner), leaf, made)
        self.num_experts = len(keep)

    def forward(
        self, x: Tensor, selection_bias: Tensor | None = None, banned: Tensor | None = None
    ) -> Routing:
        """Route x `[N, d]` of any dtype; under autocast too in fp32. banned: `[E]` bool, who may not be chosen."""
        if torch.is_autocast_enabled(x.device.type):
            with torch.autocast(x.device.type, enabled=False):
                return self.forward(x, selection_bias, banned)
        jitters = self.training and self.jitter_noise > 0
        if x.dtype != torch.float64 and (jitters or not self.takes_any_dtype):
            x = x.float()
        if jitters:
            noise = torch.empty_like(x).uniform_(1 - self.jitter_noise, 1 + self.jitter_noise)
            x = x * noise
        logits = self.score(x)
        if banned is None:
            return self.select(logits, selection_bias)
        logits = logits.masked_fill(banned, -torch.inf)
        bias = logits.new_zeros(self.num_experts) if selection_bias is None else selection_bias
        # In the bias too: a probability of 0 plus another expert's bias could still win.
        return self.select(logits, bias.masked_fill(banned, -torch.inf)).without(banned)


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
