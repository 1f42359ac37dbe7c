"""A control without anything to learn: experts by a hash of the token's id, or of the prompt's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..config import MoeLoraConfig
from ..validation import check_integer
from .base import Router, Routing, register_router

# 31 bits: products of two such numbers fit into int64, so no result depends on how a machine
# overflows.
BITS = 2**31 - 1
FACTOR = 0x45D9F3B


@register_router("hashed")
class HashedRouter(Router):
    """The K = `num_experts_per_tok` experts that hash highest together with the token's id, each
    with weight 1/K (Hash Layers, arXiv:2106.04426).

    At sequence level the ids of the prompt, in their order, make one number, whose hash chooses.
    Every choice has a key of its own, and the hash of (seed, id, key) ranks them: the K are always
    different, the same on any machine, and an expert that comes or goes takes or leaves its own
    tokens alone. It has no parameters. Its logits are 0 for what it chooses, else −inf.
    """

    @dataclass(frozen=True)
    class Options:
        """Settings of router="hashed".

        Args:
            seed: another one gives another table.
        """

        seed: int = 0

        def __post_init__(self) -> None:
            check_integer("router_options['seed']", self.seed, 0, BITS)

    options: Options
    reads: ClassVar[str] = "input_ids"
    fills_every_slot = True
    expert_rows: ClassVar[frozenset[str]] = frozenset({"keys"})
    keys: Tensor

    def __init__(self, config: MoeLoraConfig, in_features: int):
        super().__init__(config, in_features)
        self.register_buffer("keys", torch.arange(self.num_choices))

    def blank_rows(self, count: int, device: torch.device | None = None) -> Tensor:
        """Token ids `[count]`, all 0."""
        return torch.zeros(count, dtype=torch.int64, device=device)

    def score(self, x: Tensor) -> Tensor:
        """The hash of each choice with token ids x `[N]`, in [0, 1) fp32: `[N, num_choices]`."""
        return self._hashes(x).float() / (BITS + 1)

    def forward(
        self,
        x: Tensor,
        selection_bias: Tensor | None = None,
        banned: Tensor | None = None,
        *,
        prompt_mask: Tensor | None = None,
    ) -> Routing:
        """Route tokens, or prompts as a whole.

        Args:
            x: token ids `[N]`, or of prompts `[B, S]` (then N = B).
            selection_bias: not read; there are no probabilities to balance.
            banned: who may not be chosen, `[E]` bool.
            prompt_mask: which tokens of the prompts count, `[B, S]` bool; None for all.
        """
        if x.dim() == 2:
            x = _of_prompts(x, prompt_mask)
        elif prompt_mask is not None:
            raise ValueError(f"prompt_mask is for prompts x [B, S]; x is {tuple(x.shape)}.")
        # Exact integers, not logits as in other routers (MPS has no float64), and the number of a
        # choice breaks ties, on every device in the same way.
        order = torch.arange(self.num_choices, device=x.device)
        ranks = self._hashes(x) * (2 * len(order)) + order
        if banned is not None:
            choices = torch.nn.functional.pad(banned, (0, int(self.null_expert)))
            ranks = ranks.masked_fill(choices, -1)
        highest = ranks.topk(self.num_experts_per_tok, dim=-1)
        allowed = highest.values >= 0
        weights = allowed / allowed.sum(-1, keepdim=True).clamp(min=1)
        logits = torch.full(ranks.shape, -torch.inf, device=x.device)
        logits = logits.scatter(-1, highest.indices, torch.where(allowed, 0.0, -torch.inf))
        routing = Routing(logits, highest.indices, weights)
        return routing._emptied(~allowed | (highest.indices == self.num_experts))

    def _hashes(self, x: Tensor) -> Tensor:
        """The hash of each choice with each id of x `[N]`: `[N, num_choices]`, 31 bits each."""
        rows = _mixed((x & BITS) ^ _mixed(self.options.seed + 1))
        return _mixed((rows[:, None] * FACTOR + _mixed(self.keys.to(x.device))) & BITS)

    @torch.no_grad()
    def resize(self, keep: Sequence[int | None]) -> None:
        """Become a router of `len(keep)` experts.

        A new expert, and the copy of another, gets a key that none has.

        Args:
            keep: expert i is the former expert `keep[i]`, or a new one where that is None.
        """
        former = self.keys.tolist()
        fresh = max(former) + 1
        # Of an expert and its copy the one that stays in its place keeps the key.
        staying = {e for i, e in enumerate(keep) if e == i}
        keys = []
        for i, e in enumerate(self.with_null(keep)):
            is_copy = e is None or former[e] in keys or (e in staying and e != i)
            if e is None or is_copy:
                keys.append(fresh)
                fresh += 1
            else:
                keys.append(former[e])
        self.keys = torch.tensor(keys, device=self.keys.device)
        self.num_experts = len(keep)


def _mixed(number):
    """A number or int64 tensor in [0, 2³¹) as another one, whose bits depend on all bits of it."""
    for _ in range(2):
        number = ((number ^ (number >> 16)) * FACTOR) & BITS
    return number ^ (number >> 15)


def _of_prompts(ids: Tensor, mask: Tensor | None) -> Tensor:
    """One number for each prompt `[B]`: of its ids `[B, S]` and where in the prompt they stand."""
    counted = torch.ones_like(ids) if mask is None else mask.to(ids.dtype)
    # Not where in the row: padding on the left moves nothing.
    places = (counted.cumsum(1) - 1).clamp(min=0)
    return (_mixed((ids & BITS) ^ _mixed(places + 1)) * counted).sum(1) & BITS
