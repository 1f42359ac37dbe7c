"""Routers: from hidden states to the experts that act, `[T, d] → Routing`, always in fp32."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar, NamedTuple

import torch
from moelora_kernels import router_logits
from torch import Tensor, nn

from ..config import MoeLoraConfig
from .pooling import pool_attention, pool_last, pool_mean


class Routing(NamedTuple):
    """What a router decided for N rows (tokens, or sequences at sequence level).

    logits: `[N, E]` fp32 (with `null_expert` `[N, E + 1]`), before the softmax; −inf for an expert
    that is banned.
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
        if taken is not None and (taken.__module__, taken.__qualname__) != (
            cls.__module__,
            cls.__qualname__,
        ):
            raise ValueError(
                f"The router name {name!r} is taken by {taken.__module__}.{taken.__qualname__}."
            )
        ROUTERS[name] = cls
        return cls

    return register


class Router(nn.Module):
    """Base class: `forward(x [N, d]) → Routing` among `config.num_choices` choices, the experts and
    perhaps none.

    A subclass implements `score`, `select` where it chooses otherwise, and `resize` where experts
    that come and go change more than the rows of its parameters. Parameters are bare
    `nn.Parameter`s (no `nn.Linear` inside, which PEFT's "all-linear" would adapt).
    shared_parameters: the names of those that have no row for each choice.
    fills_every_slot: it never leaves a slot empty (−1) nor names an expert twice in a row, which
    spares every plan to look. takes_any_dtype: `score` reads x as it comes, and computes in fp32
    all the same.
    backend: of `moelora_kernels`, as in `Mixture`.
    """

    fills_every_slot = False
    takes_any_dtype = False
    backend: str | None = None
    shared_parameters: ClassVar[frozenset[str]] = frozenset({"pool_query"})

    def __init__(self, config: MoeLoraConfig, in_features: int):
        super().__init__()
        self.num_experts = config.num_experts
        self.null_expert = config.null_expert
        self.num_experts_per_tok = config.num_experts_per_tok
        self.norm_topk_prob = config.norm_topk_prob and config.num_experts_per_tok > 1
        self.jitter_noise = config.router_jitter_noise
        self.input_norm = config.router_input_norm
        self.pooling = config.router_pooling
        self.in_features = in_features
        if self.null_expert:
            self.fills_every_slot = False
        if self.pooling == "attention":
            # Zeros: the mean over the prompt, from which it learns.
            self.pool_query = nn.Parameter(torch.zeros(in_features))

    @property
    def num_choices(self) -> int:
        """The number of logits of a row."""
        return self.num_experts + int(self.null_expert)

    def normalised(self, x: Tensor) -> Tensor:
        """x `[…, d]` in fp32 (float64 stays), with router_input_norm over its root mean square: x /
        √mean(x²).
        """
        x = x if x.dtype == torch.float64 else x.float()
        if not self.input_norm:
            return x
        return x * (x.square().mean(-1, keepdim=True) + torch.finfo(x.dtype).tiny).rsqrt()

    def pool(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """The prompts x `[B, S, d]`, with their tokens in mask `[B, S]`, as vectors `[B, d]`, by
        router_pooling.
        """
        # Norms first: the first token of many models is a hundred times as large as the others.
        x = self.normalised(x)
        if self.pooling == "attention":
            return pool_attention(x, mask, self.pool_query)
        return pool_last(x, mask) if self.pooling == "last" else pool_mean(x, mask)

    def score(self, x: Tensor) -> Tensor:
        """Logits `[N, num_choices]` fp32 of x `[N, d]` fp32 (of any dtype, with takes_any_dtype)."""
        raise NotImplementedError

    def select(self, logits: Tensor, selection_bias: Tensor | None) -> Routing:
        """The `num_experts_per_tok` experts of the largest probability, with those probabilities as
        weights.

        `selection_bias` `[E]` shifts which experts are chosen, never their weights
        (arXiv:2408.15664).
        """
        if self.norm_topk_prob and selection_bias is None:
            # The same numbers as below with fewer operations: the softmax's own denominator
            # cancels.
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
        """Become a router of `len(keep)` experts: number i is the former number `keep[i]`, or None,
        a new one.

        Every parameter and buffer with a row for each choice is re-indexed; a new expert's row is
        the mean of the experts' rows that are kept. A router that keeps its experts otherwise
        overrides this.
        """
        kept = [i for i in keep if i is not None]
        for name, tensor in [*self.named_parameters(), *self.named_buffers()]:
            if not self.has_row_for_each_choice(name, tensor):
                continue
            new = (
                tensor[kept].mean(0)
                if tensor.is_floating_point() and kept
                else torch.zeros_like(tensor[0])
            )
            made = torch.stack([new if i is None else tensor[i] for i in self.with_null(keep)])
            owner, _, leaf = name.rpartition(".")
            if isinstance(tensor, nn.Parameter):
                made = nn.Parameter(made, requires_grad=tensor.requires_grad)
            setattr(self.get_submodule(owner), leaf, made)
        self.num_experts = len(keep)

    def has_row_for_each_choice(self, name: str, tensor: Tensor) -> bool:
        """Whether the parameter or buffer of this name is one of those that `resize` re-indexes."""
        return (
            name not in self.shared_parameters
            and tensor.dim() > 0
            and len(tensor) == self.num_choices
        )

    def with_null(self, keep: Sequence[int | None]) -> list[int | None]:
        """`keep` for rows: after the experts' the one of no expert, where there is one."""
        return [*keep, *([self.num_experts] if self.null_expert else [])]

    def forward(
        self, x: Tensor, selection_bias: Tensor | None = None, banned: Tensor | None = None
    ) -> Routing:
        """Route x `[N, d]` of any dtype; under autocast too in fp32. banned: `[E]` bool, who may
        not be chosen.
        """
        if torch.is_autocast_enabled(x.device.type):
            with torch.autocast(x.device.type, enabled=False):
                return self.forward(x, selection_bias, banned)
        jitters = self.training and self.jitter_noise > 0
        if jitters or self.input_norm or not self.takes_any_dtype:
            x = self.normalised(x)
        if jitters:
            noise = torch.empty_like(x).uniform_(1 - self.jitter_noise, 1 + self.jitter_noise)
            x = x * noise
        logits = self.score(x)
        if banned is None:
            return self._chosen(logits, selection_bias)
        choices = nn.functional.pad(banned, (0, int(self.null_expert)))
        logits = logits.masked_fill(choices, -torch.inf)
        bias = logits.new_zeros(self.num_choices) if selection_bias is None else selection_bias
        # In the bias too: a probability of 0 plus another expert's bias could still win.
        return self._chosen(logits, bias.masked_fill(choices, -torch.inf)).without(banned)

    def _chosen(self, logits: Tensor, selection_bias: Tensor | None) -> Routing:
        """What `select` chooses; where that is no expert, the slot is empty and the others keep
        their weights.
        """
        routing = self.select(logits, selection_bias)
        if not self.null_expert:
            return routing
        null = routing.expert_ids == self.num_experts
        return routing._replace(
            expert_ids=routing.expert_ids.masked_fill(null, -1),
            expert_weights=routing.expert_weights.masked_fill(null, 0.0),
        )


@register_router("top_k")
class TopKRouter(Router):
    """Linear scores, softmax over all experts, the top k renormalised (Mixtral, arXiv:2401.04088).

    logits = x Wᵀ, W `[num_choices, d]`.
    """

    fills_every_slot = True
    takes_any_dtype = True

    def __init__(self, config: MoeLoraConfig, in_features: int):
        super().__init__(config, in_features)
        self.weight = nn.Parameter(torch.empty(config.num_choices, in_features))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Small random rows: equal ones would send every token to the first experts by the tie rule
        of top-k.
        """
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


@register_router("mlp")
class MlpRouter(Router):
    """W₂ gelu(W₁ x + b): one hidden layer of `router_hidden_size` under the scores of `top_k`.

    W₁ `[H, d]`, b `[H]`, W₂ `[num_choices, H]`.
    """

    fills_every_slot = True
    shared_parameters = Router.shared_parameters | {"hidden_weight", "hidden_bias"}

    def __init__(self, config: MoeLoraConfig, in_features: int):
        super().__init__(config, in_features)
        width = config.router_hidden_size
        self.hidden_weight = nn.Parameter(torch.empty(width, in_features))
        self.hidden_bias = nn.Parameter(torch.zeros(width))
        self.weight = nn.Parameter(torch.empty(config.num_choices, width))
        nn.init.normal_(self.hidden_weight, std=in_features**-0.5)
        nn.init.normal_(self.weight, std=width**-0.5)

    def score(self, x: Tensor) -> Tensor:
        """W₂ gelu(W₁ x + b): x `[N, d]` → `[N, num_choices]`."""
        first, bias, second = (
            p.to(x.dtype) for p in (self.hidden_weight, self.hidden_bias, self.weight)
        )
        return nn.functional.gelu(x @ first.T + bias) @ second.T
