"""A blend of token and sequence routing: each token's own gate, and one of its prompt."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from ..config import MoeLoraConfig
from ..validation import check_number, shown
from .base import Router, Routing, _without_autocast, register_router
from .top_k import TopKRouter


@dataclass
class PromptScores:
    """What a router makes of the prompts in one call.

    Args:
        mask: which tokens belong to the prompts, `[B, S]` bool; None for all.
        logits: `[B, num_choices]` of prompts that were read before, whose tokens follow; None where
            this call reads them, and writes them here.
    """

    mask: Tensor | None = None
    logits: Tensor | None = None


@register_router("hybrid")
class HybridRouter(TopKRouter):
    """p = α softmax(m Pᵀ) + (1 − α) softmax(x Wᵀ) of a token x and its prompt's pooled vector m,
    the top k of which are renormalised (HMoRA, ICLR 2025).

    α = sigmoid(a_l + b): a_l is evenly spaced between the log-odds of the two numbers in `alpha`
    from the first decoder layer to the last, so that deep layers heed the prompt more; b, 0 at
    first, trains with `learn_alpha`. m is pooled by `router_pooling` over what this router reads of
    the prompt, which is known as at sequence level and whose logits are kept while generating.
    `Routing.logits` are log p.

    W and P `[num_choices, d]`; b `[1]`.
    """

    @dataclass(frozen=True)
    class Options:
        """Settings of router="hybrid".

        Args:
            alpha: the prompt's share at first: one number for all layers, or that of the first
                and that of the last decoder layer.
            learn_alpha: whether each router's share trains.
        """

        alpha: float | list[float] = field(default_factory=lambda: [0.12, 0.88])
        learn_alpha: bool = True

        def __post_init__(self) -> None:
            shares = self.alpha if isinstance(self.alpha, Sequence) else [self.alpha]
            if isinstance(self.alpha, Sequence) and len(shares) != 2:
                raise ValueError(
                    f"router_options['alpha']={shown(self.alpha)} lists {len(shares)} numbers; "
                    "expected one number, or two: of the first and of the last layer."
                )
            for share in shares:
                # At 0 it is router='top_k', at 1 routing_level='sequence'.
                check_number("router_options['alpha']", share, 0, 1, open_low=True, open_high=True)

    options: Options
    takes_any_dtype = False
    reads_prompt: ClassVar[bool] = True
    expert_rows: ClassVar[frozenset[str]] = frozenset({"weight", "prompt_weight"})
    shared_parameters = Router.shared_parameters | {"alpha_shift"}

    def __init__(self, config: MoeLoraConfig, in_features: int):
        super().__init__(config, in_features)
        self.prompt_weight = nn.Parameter(torch.empty_like(self.weight))
        nn.init.normal_(self.prompt_weight, std=in_features**-0.5)
        if self.options.learn_alpha:
            self.alpha_shift = nn.Parameter(torch.zeros(1))

    def log_odds(self) -> Tensor | float:
        """log(α / (1 − α)) of this router, `[1]` or a number."""
        alpha = self.options.alpha
        low, high = alpha if isinstance(alpha, Sequence) else (alpha, alpha)
        first, last = (math.log(share) - math.log1p(-share) for share in (low, high))
        odds = first + (last - first) * self.depth
        return odds + self.alpha_shift if self.options.learn_alpha else odds

    @_without_autocast
    def forward(
        self,
        x: Tensor,
        selection_bias: Tensor | None = None,
        banned: Tensor | None = None,
        *,
        prompt_mask: Tensor | None = None,
        prompt: PromptScores | None = None,
    ) -> Routing:
        """Route every token by itself and by its prompt.

        Args:
            x: tokens of B sequences `[B, S, d]`, or `[N, d]` of which each is its own prompt.
            selection_bias: as in `Router.forward`.
            banned: who may not be chosen, `[E]` bool.
            prompt_mask: which tokens belong to the prompts, `[B, S]` bool; None for all.
            prompt: the same mask, or what an earlier call made of the prompts.
        """
        if x.dim() == 2 and prompt_mask is not None:
            raise ValueError(f"prompt_mask is for prompts x [B, S, d]; x is {tuple(x.shape)}.")
        x = x if x.dim() == 3 else x[:, None]
        prompt = PromptScores(prompt_mask) if prompt is None else prompt
        tokens = self._prepared(x.flatten(0, 1))
        if prompt.logits is None:
            pooled = self._prepared(self.pool(x, prompt.mask))
            prompt.logits = self.product(pooled, self.prompt_weight)
        of_prompt = prompt.logits.to(tokens).log_softmax(-1).repeat_interleave(x.shape[1], dim=0)
        of_token = self.score(tokens).log_softmax(-1)
        odds = torch.as_tensor(self.log_odds()).to(tokens)
        blend = torch.logaddexp(of_prompt + logsigmoid(odds), of_token + logsigmoid(-odds))
        return self._decided(tokens, blend, selection_bias, banned)
