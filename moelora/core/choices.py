"""`Choices`: what the configuration fixes of every choice of experts, as tables on each device.

Which routed experts a router's layer does not have, which experts act whatever is chosen, and which
are left out of single rows in training.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..config import MoeLoraConfig


@dataclass(frozen=True)
class Tables:
    """The tables on one device.

    Args:
        absent: by router, which routed experts its layer does not have, `[num_routed]` bool; None
            where it has all.
        shared: the numbers of the shared experts, `[num_shared]` int64.
        kept: the share of rows in which each expert acts in training, `[E]` fp32.
    """

    absent: tuple[Tensor | None, ...]
    shared: Tensor
    kept: Tensor


class Choices:
    """What the configuration fixes of every choice of experts.

    Args:
        config: the mixture's.
        layers: the decoder layer that each router belongs to, None outside of any.

    Attributes:
        sizes: how many choices each router has, the null expert among them.
        num_shared: how many experts act on every row.
        drops: whether training leaves experts out.
    """

    def __init__(self, config: MoeLoraConfig, layers: Sequence[str | None]):
        routed = config.num_routed_experts
        by_layer = config.layer_experts or {}
        self._present = [by_layer.get(layer or "", range(routed)) for layer in layers]
        self._routed = routed
        self._kept = [1.0 - share for share in config._per_expert("expert_dropout")]
        self.sizes = tuple(len(own) + int(config.null_expert) for own in self._present)
        self.num_shared = config.num_shared_experts
        self.drops = any(kept < 1 for kept in self._kept)
        self._tables: dict[torch.device, Tables] = {}

    def lacks_some(self, index: int) -> bool:
        """Whether router number `index` must leave out experts that its layer does not have."""
        return len(self._present[index]) < self._routed

    def on(self, device: torch.device) -> Tables:
        """The tables on `device`, remembered: a copy from the host waits."""
        if device not in self._tables:
            self._tables[device] = self._on(device)
        return self._tables[device]

    def _on(self, device: torch.device) -> Tables:
        absent = []
        for index, present in enumerate(self._present):
            lacking = [e not in present for e in range(self._routed)]
            mask = torch.tensor(lacking, device=device) if self.lacks_some(index) else None
            absent.append(mask)
        numbers = range(self._routed, self._routed + self.num_shared)
        shared = torch.tensor(numbers, dtype=torch.int64, device=device)
        return Tables(tuple(absent), shared, torch.tensor(self._kept, device=device))

    def absent(self, index: int, device: torch.device) -> Tensor | None:
        """Which routed experts router number `index` may never choose, `[num_routed]` bool."""
        return self.on(device).absent[index] if self.lacks_some(index) else None

    def with_shared(
        self, ids: Tensor, weights: Tensor, banned: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Slots `[N, K]`, and after them those of the shared experts, of weight 1
        (arXiv:2401.06066).

        Args:
            ids: the experts, −1 for none.
            weights: theirs.
            banned: `[E]` bool, whose slots stay empty; None for nobody's.
        """
        if not self.num_shared:
            return ids, weights
        shared = self.on(ids.device).shared
        ones = weights.new_ones(len(shared))
        if banned is not None:
            out = banned.to(ids.device)[shared]
            shared = shared.masked_fill(out, -1)
            ones = ones.masked_fill(out, 0.0)
        rows = (len(ids), -1)
        both = ((ids, shared), (weights, ones))
        all_ids, all_weights = (torch.cat([own, more.expand(rows)], dim=1) for own, more in both)
        return all_ids, all_weights

    def dropped(self, ids: Tensor, weights: Tensor) -> Tensor:
        """Weights `[N, K]`: 0 in slots left out by chance, the others over their chance to stay.

        A slot that is left out keeps its expert, so that no row gets an empty slot. Recomputed
        layers draw the same, since checkpointing restores the generators.
        """
        kept = self.on(ids.device).kept[ids.clamp(min=0)]
        stays = torch.rand(weights.shape, device=weights.device) < kept
        return weights * (stays / kept).to(weights.dtype)
