"""The stacked experts: their parameters, initialisation and freezing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class LoraFactors:
    """One expert in one linear: A `[r, d_in]` and B `[r, d_out]`, rank-major, views of the
    mixture's own rows.

    It adds scaling · (x Aᵀ) B. Writing into A or B (under `torch.no_grad()`) changes the expert.
    """

    A: Tensor
    B: Tensor
    scaling: float


def rank_offsets(ranks: Sequence[int]) -> tuple[int, ...]:
    """Where each expert's rows begin, `[E + 1]`: the running sum of the ranks."""
    return tuple(accumulate(ranks, initial=0))


class Factor(nn.Module):
    """A stacked low-rank factor `[Σ blocks, width]`: one block of rows for each (linear and)
    expert.

    All rows are one trainable parameter, `rows`. Frozen experts' rows move into a second one,
    `frozen_rows`,
    without gradient: rows that shared a trainable parameter would decay under AdamW whatever their
    gradient. The state dict always holds the whole stack as one tensor, `weight`, in block order,
    so a checkpoint does not depend on what was frozen.

    blocks: the number of rows of each block. experts: whose block it is.
    """

    def __init__(self, blocks: Sequence[int], experts: Sequence[int], width: int, **factory):
        super().__init__()
        self.blocks = tuple(blocks)
        self.experts = tuple(experts)
        self.frozen_experts: frozenset[int] = frozenset()
        self.rows: nn.Parameter | None = nn.Parameter(
            torch.zeros(sum(self.blocks), width, **factory)
        )
        self.frozen_rows: nn.Parameter | None = None

    def reset_kaiming(self) -> None:
        """PEFT's initialisation of lora_A: uniform in ±1/√width, the same for every rank."""
        width = self.stacked().shape[1]
        for rows in self.parameters():
            nn.init.uniform_(rows, -1 / math.sqrt(width), 1 / math.sqrt(width))

    def stacked(self) -> Tensor:
        """All rows in block order, `[Σ blocks, width]`."""
        if self.frozen_rows is None:
            assert self.rows is not None
            return self.rows
        if self.rows is None:
            return self.frozen_rows
        parts = {
            False: iter(self.rows.split(self._sizes(False))),
            True: iter(self.frozen_rows.split(self._sizes(True))),
        }
        return torch.cat([next(parts[e in self.frozen_experts]) for e in self.experts])

    def expert_rows(self, expert: int) -> list[slice]:
        """Where expert `expert`'s blocks lie in `stacked()`."""
        starts = rank_offsets(self.blocks)
        return [slice(starts[i], starts[i + 1]) for i, e in enumerate(self.experts) if e == expert]

    def set_frozen(self, experts: frozenset[int]) -> None:
        """Freeze exactly the blocks of `experts`; their bits stay. Makes new parameters where that
        changes anything.
        """
        if experts == self.frozen_experts:
            return
        whole = self.stacked().detach()
        blocks = list(zip(self.experts, whole.split(list(self.blocks))))
        self.frozen_experts = experts
        frozen = [rows for e, rows in blocks if e in experts]
        trained = [rows for e, rows in blocks if e not in experts]
        self.frozen_rows = nn.Parameter(torch.cat(frozen), requires_grad=False) if frozen else None
        self.rows = nn.Parameter(torch.cat(trained)) if trained else None

    def block(self, index: int) -> Tensor:
        """Block number `index` `[blocks[index], width]`: a view of the parameter that holds it, to
        read or to write.
        """
        frozen = self.experts[index] in self.frozen_experts
        held = self.frozen_rows if frozen else self.rows
        assert held is not None
        same = [
            n
            for e, n in zip(self.experts[:index], self.blocks)
            if (e in self.frozen_experts) is frozen
        ]
        return held.detach()[sum(same) : sum(same) + self.blocks[index]]

    @torch.no_grad()
    def restacked(self, keep: Sequence[int | None], fresh: Sequence[Tensor | None]) -> Factor:
        """A factor whose expert i is this one's `keep[i]`, frozen if that is, or where None a new
        one that trains.

        fresh: the new expert's rows `[r, width]` for each linear, None where it is not there.
        """
        whole = self.stacked().detach()
        former, blocks = len(set(self.experts)), whole.split(list(self.blocks))
        parts = []
        for i in range(len(blocks) // former):
            for e in keep:
                rows = fresh[i] if e is None else blocks[i * former + e]
                parts.append(whole[:0] if rows is None else rows.to(whole))
        experts = list(range(len(keep))) * (len(blocks) // former)
        made = Factor(
            [len(p) for p in parts], experts, whole.shape[1], device=whole.device, dtype=whole.dtype
        )
        made.copy_(torch.cat(parts))
        made.set_frozen(frozenset(i for i, e in enumerate(keep) if e in self.frozen_experts))
        if made.rows is not None and self.rows is not None:
            made.rows.requires_grad_(self.rows.requires_grad)
        return made

    @torch.no_grad()
    def copy_(self, whole: Tensor) -> None:
        """Overwrite all rows with `whole` `[Σ blocks, width]`."""
        for rows, frozen in ((self.rows, False), (self.frozen_rows, True)):
            if rows is not None:
                parts = zip(self.experts, whole.split(list(self.blocks)))
                rows.copy_(torch.cat([p for e, p in parts if (e in self.frozen_experts) is frozen]))

    def _sizes(self, frozen: bool) -> list[int]:
        return [
            n for e, n in zip(self.experts, self.blocks) if (e in self.frozen_experts) is frozen
        ]

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        whole = self.stacked()
        destination[prefix + "weight"] = whole if keep_vars else whole.detach()

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing, unexpected, errors
    ):
        key = prefix + "weight"
        whole = state_dict.get(key)
        expected = (sum(self.blocks), self.stacked().shape[1])
        if whole is None:
            missing.append(key)
        elif tuple(whole.shape) != expected:
            errors.append(f"{key} has shape {tuple(whole.shape)}; expected {expected}.")
        else:
            self.copy_(whole)
