"""What every launch needs to know beside its tensors, in a form that torch operators take."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..dispatch import MASKED
from ..layout import Layout
from ..plan import Plan
from .slot_map import SlotMap, slot_map
from .tiles import group_block


class Job(NamedTuple):
    """A plan's path and indices, and the tables of a factor's `Layout`.

    ids [rows, K] int64. experts [R], starts, ranks [L · E] int32, scales [E] fp32: of the layout.
    slots: the sorted slots, where the path needs them. tiles: the name of a tuned table, or "".
    """

    path: str
    tiles: str
    tokens_per_row: int
    num_experts: int
    num_linears: int
    total_rank: int
    max_rank: int
    ids: Tensor
    experts: Tensor
    starts: Tensor
    ranks: Tensor
    scales: Tensor
    slots: SlotMap | None

    @property
    def num_slots(self) -> int:
        """K."""
        return self.ids.shape[1]

    @property
    def masked(self) -> bool:
        """Whether h is that of all experts, [T, R], and not of the slots, [T, K, L, max rank]."""
        return self.path in MASKED

    def h_shape(self, num_tokens: int) -> tuple[int, ...]:
        """The shape of h of all linears."""
        if self.masked:
            return num_tokens, self.total_rank
        return num_tokens, self.num_slots, self.num_linears, self.max_rank

    def flat(self) -> tuple[list[Tensor], list[int], str, str]:
        """The job as the last four arguments of an operator."""
        slots = () if self.slots is None else self.slots[1:]
        block = 0 if self.slots is None else self.slots.block
        return [*self[7:12], *slots], [*self[2:7], block], self.path, self.tiles


def unflatten(tables: list[Tensor], sizes: list[int], path: str, tiles: str) -> Job:
    """The job of `Job.flat`."""
    slots = SlotMap(sizes[5], *tables[5:]) if len(tables) > 5 else None
    return Job(path, tiles, *sizes[:5], *tables[:5], slots)  # type: ignore[call-arg]


def job_of(plan: Plan, layout: Layout, learns: bool) -> Job:
    """The job of a plan for one factor; learns: whether its backward pass will run."""
    return Job(
        plan.path,
        plan.tiles,
        plan.tokens_per_row,
        layout.num_experts,
        layout.num_linears,
        layout.total_rank,
        layout.max_rank,
        plan.expert_ids,
        layout.experts,
        layout.starts,
        layout.ranks,
        layout.scales,
        _slots(plan, learns),
    )


def one_expert(factor: Tensor, num_tokens: int) -> Job:
    """The job of a plain product with `factor` [R, d], as one expert that every token has."""
    none = factor.new_empty(0, dtype=torch.int32)
    ids = factor.new_empty((num_tokens, 0), dtype=torch.int64)
    rank = factor.shape[0]
    return Job("dense", "", 1, 1, 1, rank, rank, ids, none, none, none, none, None)


def _slots(plan: Plan, learns: bool) -> SlotMap | None:
    """The sorted slots where the path, or its backward pass, needs them; kept on the plan."""
    if plan.path in (*MASKED, "decode") or (plan.path == "sequence" and not learns):
        return None
    slots = plan.memo.get("slot_map")
    if slots is None:
        block = group_block(plan.num_tokens, plan.num_experts)
        slots = slot_map(plan.expert_ids, plan.tokens_per_row, plan.num_experts, block)
        plan.memo["slot_map"] = slots
    return slots
