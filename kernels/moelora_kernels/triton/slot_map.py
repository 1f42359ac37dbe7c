"""Slots sorted by expert and cut into tiles of tokens, without waiting for the device."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor


class SlotMap(NamedTuple):
    """The T * K slots sorted by (slot, expert): group g = slot * (E + 1) + expert, E = no expert.

    Slot by slot, no token occurs twice, so a pass over one slot writes each row of y once.

    tokens [T * K] int32: the token of each sorted slot. bounds [K * (E + 1) + 1] int32: the
    first of each group. groups, firsts [K, capacity] int32: the tiles of each slot, its group (-1:
    no tile) and its first sorted slot; capacity min(T, T // block + E + 1) always suffices.
    """

    block: int
    tokens: Tensor
    bounds: Tensor
    groups: Tensor
    firsts: Tensor


def slot_map(expert_ids: Tensor, tokens_per_row: int, num_experts: int, block: int) -> SlotMap:
    """expert_ids [rows, K] int64, -1 = no expert; tiles of `block` tokens; sorts rows."""
    rows, slots = expert_ids.shape
    device = expert_ids.device
    groups_per_slot = num_experts + 1
    slot_firsts = torch.arange(0, slots * groups_per_slot, groups_per_slot, device=device)
    keys = torch.where(expert_ids < 0, num_experts, expert_ids) + slot_firsts
    keys, order = keys.view(-1).sort(stable=True)
    within = torch.arange(tokens_per_row, device=device)
    tokens = (order // max(slots, 1))[:, None] * tokens_per_row + within
    every = torch.arange(slots * groups_per_slot + 1, device=device)
    bounds = torch.searchsorted(keys, every) * tokens_per_row

    counts = (
        (bounds.diff() + (block - 1)).div(block, rounding_mode="floor").view(slots, groups_per_slot)
    )
    ends = counts.cumsum(1)
    num_tokens = rows * tokens_per_row
    # Not min, which torch.compile before 2.13 cannot trace for what may be a symbol.
    capacity = num_tokens // block + groups_per_slot
    capacity = num_tokens if num_tokens < capacity else capacity
    tile = torch.arange(capacity, device=device).expand(slots, capacity).contiguous()
    expert = torch.searchsorted(ends, tile, right=True)
    there = expert < groups_per_slot
    expert = expert.clamp(max=num_experts)
    group = expert + slot_firsts[:, None]
    nth = tile - (ends - counts).gather(1, expert)
    firsts = bounds[group] + nth * block
    tiles = torch.where(there, group, -1).int(), firsts.int()
    return SlotMap(block, tokens.view(-1).int(), bounds.int(), *tiles)


def table(slots: SlotMap | None) -> tuple[Tensor | None, ...]:
    """The four arrays, as a kernel takes them."""
    return (None,) * 4 if slots is None else slots[1:]


@triton.jit
def tokens_of_tile(
    tile, slot, rows_ids, tokens, bounds, groups, firsts, tokens_per_row, capacity,
    K, E, PATH: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """The tokens of a tile for one slot, which of the lanes hold one, their row, and their expert
    (-1: none).
    """
    lane = tl.arange(0, BLOCK_T)
    if PATH == "sequence":
        tiles_per_row = tl.cdiv(tokens_per_row, BLOCK_T)
        row = tile // tiles_per_row
        within = (tile % tiles_per_row) * BLOCK_T + lane
        there = within < tokens_per_row
        token = row * tokens_per_row + within
        expert = tl.load(rows_ids + row * K + slot).to(tl.int32)
    else:
        group = tl.load(groups + slot * capacity + tile)
        place = tl.load(firsts + slot * capacity + tile) + lane
        there = place < tl.where(group >= 0, tl.load(bounds + tl.maximum(group, 0) + 1), 0)
        token = tl.load(tokens + place, mask=there, other=0)
        expert = tl.where(group >= 0, group % (E + 1), E)
        expert = tl.where(expert < E, expert, -1)
    return token, there, expert
