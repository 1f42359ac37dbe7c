"""A control: experts are drawn, not chosen."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from ..config import MoeLoraConfig
from .base import Router, Routing, register_router
from .deciding import every_choice


@register_router("random")
class RandomRouter(Router):
    """While training K different experts for each row, all equally probable, with the weight 1/K
    each (THOR, arXiv:2110.04260); in evaluation all experts with the weight 1/E, the expectation.

    It reads nothing and has no parameters. A mixture that does not beat it owes nothing to its
    router.
    """

    # In evaluation an expert that a layer lacks leaves its slot empty.
    fills_every_slot = False
    takes_any_dtype = True
    takes_selection_bias: ClassVar[bool] = False

    @classmethod
    def check_config(cls, config: MoeLoraConfig) -> None:
        """As `Router`'s, and nothing may be asked of what it does not read."""
        super().check_config(config)
        problems = {
            "norm_topk_prob=False": not config.norm_topk_prob,
            "router_input_norm=True": config.router_input_norm,
            "router_pooling": config.router_pooling != "mean",
            "router_jitter_noise": config.router_jitter_noise > 0,
        }
        if wrong := [name for name, is_set in problems.items() if is_set]:
            raise ValueError(
                f"{', '.join(wrong)}: router={config.router!r} reads nothing and gives each of its "
                "experts the same weight. Leave that at its default, or use another router."
            )

    @property
    def num_slots(self) -> int:
        """K while training, else one for each choice."""
        return self.num_experts_per_tok if self.training else self.num_choices

    def score(self, x: Tensor) -> Tensor:
        """Zeros: x `[N, d]` → `[N, num_choices]`."""
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        return torch.zeros(len(x), self.num_choices, dtype=dtype, device=x.device)

    def select(self, x: Tensor, logits: Tensor, selection_bias: Tensor | None) -> Routing:
        """K drawn choices, or all; the selection bias, of bans alone, is in the logits."""
        allowed = logits.isfinite()
        if self.training:
            drawn = torch.rand_like(logits).masked_fill(~allowed, -1.0)
            ids = drawn.topk(self.num_slots, dim=-1).indices
        else:
            ids = every_choice(logits)
        used = allowed.gather(-1, ids).to(logits.dtype)
        return Routing(logits, ids, used / used.sum(-1, keepdim=True).clamp(min=1))
