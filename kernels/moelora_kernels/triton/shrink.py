"""x Fᵀ into rank space: h of the forward pass, and u = dy Bᵀ of the backward one."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .layout import Layout
from .slot_map import SlotMap, table, tokens_of_tile
from .tiles import ceil_div, launch_options, split_count, tile_for, with_block_t


@triton.jit
def shrink_kernel(
    x, factor, planes,
    row_ids, tokens, bounds, groups, firsts, starts, ranks,
    num_tokens, tokens_per_row, capacity, K, E, total_rank, d, d_per_split, x_stride, plane_stride,
    PATH: tl.constexpr, MAX_RANK: tl.constexpr, L: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """planes[split, t, …] = x[t, part of d] F[rows, part of d]ᵀ, fp32.

    Grid (tiles of tokens, blocks of rank, splits of d). Dense: h [T, R], every row of F for every
    token. Grouped, sequence: h [T, K, L, max rank], the rows of the slot's expert in each of the
    site's L linears; what is past its rank, and an empty slot, becomes 0.
    """
    block = tl.program_id(1)
    split = tl.program_id(2)
    begin = split * d_per_split
    end = tl.minimum(begin + d_per_split, d)
    if PATH == "dense":
        token = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
        there = token < num_tokens
        row = block * BLOCK_R + tl.arange(0, BLOCK_R)
        used = row < total_rank
        stored = used
        place = token.to(tl.int64)[:, None] * total_rank + row[None, :]
    else:
        # Slots side by side read the same tokens, while those are in cache.
        slot = tl.program_id(0) % K
        tile = tl.program_id(0) // K
        token, there, expert = tokens_of_tile(
            tile, slot, row_ids, tokens, bounds, groups, firsts, tokens_per_row, capacity,
            K, E, PATH, BLOCK_T,
        )  # fmt: skip
        linear = block % L
        column = (block // L) * BLOCK_R + tl.arange(0, BLOCK_R)
        which = linear * E + tl.maximum(expert, 0)
        used = column < tl.where(expert >= 0, tl.load(ranks + which), 0)
        stored = column < MAX_RANK
        row = tl.load(starts + which) + column
        end = tl.where(expert >= 0, end, begin)
        place = ((token.to(tl.int64) * K + slot) * L + linear)[:, None] * MAX_RANK + column[None, :]

    acc = multiply_columns(
        x, factor, token, there, row, used, begin, end, x_stride, d, x.dtype.element_ty, BLOCK_T,
        BLOCK_R, BLOCK_D,
    )  # fmt: skip
    tl.store(
        planes + split.to(tl.int64) * plane_stride + place,
        acc,
        mask=there[:, None] & stored[None, :],
    )


@triton.jit
def multiply_columns(
    x, factor, token, there, row, used, begin, end, x_stride, factor_stride,
    dtype: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """x[token, begin:end] F[row, begin:end]ᵀ, the product in dtype, the sum in fp32."""
    x_rows = x + token.to(tl.int64)[:, None] * x_stride
    factor_rows = factor + row.to(tl.int64)[:, None] * factor_stride
    acc = tl.zeros((BLOCK_T, BLOCK_R), dtype=tl.float32)
    for first in range(begin, end, BLOCK_D):
        column = first + tl.arange(0, BLOCK_D)
        inside = column < end
        x_tile = tl.load(x_rows + column[None, :], mask=there[:, None] & inside[None, :], other=0.0)
        f_tile = tl.load(
            factor_rows + column[None, :], mask=used[:, None] & inside[None, :], other=0.0
        )
        acc = tl.dot(x_tile.to(dtype), tl.trans(f_tile.to(dtype)), acc, input_precision="ieee")
    return acc


@triton.jit
def sum_planes(planes, place, mask, splits, plane_stride):
    """The planes at `place`, summed in order."""
    total = tl.load(planes + place, mask=mask, other=0.0)
    for split in range(1, splits):
        total += tl.load(planes + split * plane_stride + place, mask=mask, other=0.0)
    return total


def h_shape(
    num_tokens: int, num_slots: int, path: str, site: tuple[int, int, int]
) -> tuple[int, ...]:
    """The shape of a site's h, for `sizes` of its offsets."""
    linears, total, largest = site
    return (num_tokens, total) if path == "dense" else (num_tokens, num_slots, linears, largest)


def shrink_planes(
    x: Tensor,
    factor: Tensor,
    expert_ids: Tensor,
    slots: SlotMap | None,
    site: Layout,
    path: str,
    tokens_per_row: int,
    tiles: str,
) -> Tensor:
    """h in fp32 planes [splits, *h_shape], to be summed in order; x [T, d], factor [Σ_l R_l, d]."""
    num_tokens, d = x.shape
    num_slots = expert_ids.shape[1]
    shape = h_shape(num_tokens, num_slots, path, (site.num_linears, site.total_rank, site.max_rank))
    if 0 in shape:
        return x.new_zeros((1, *shape), dtype=torch.float32)
    width = site.total_rank if path == "dense" else site.max_rank
    block = slots.block if slots is not None and path == "grouped" else None
    tokens = block or (tokens_per_row if path == "sequence" else num_tokens)
    tile = with_block_t(tile_for("shrink", tokens, width, x.dtype, tiles), block)
    grid_t = tiles_of_tokens(num_tokens, num_slots, path, tokens_per_row, slots, tile.BLOCK_T)
    grid_r = ceil_div(width, tile.BLOCK_R) * (1 if path == "dense" else site.num_linears)
    splits, d_per_split = split_count(grid_t * grid_r, d, tile.BLOCK_D, x.device)
    planes = x.new_empty((splits, *shape), dtype=torch.float32)
    shrink_kernel[(grid_t, grid_r, splits)](
        x, factor, planes,
        expert_ids, *table(slots), site.starts, site.ranks,
        num_tokens, tokens_per_row, slots.groups.shape[1] if slots else 0,
        num_slots, site.num_experts, site.total_rank, d, d_per_split, x.stride(0), planes.stride(0),
        PATH=path, MAX_RANK=site.max_rank, L=site.num_linears, **launch_options(tile),
    )  # fmt: skip
    return planes


def tiles_of_tokens(
    num_tokens: int,
    num_slots: int,
    path: str,
    tokens_per_row: int,
    slots: SlotMap | None,
    block: int,
) -> int:
    """How many tiles of tokens there are, for every slot where a tile has one."""
    if path == "dense":
        return ceil_div(num_tokens, block)
    if path == "sequence":
        return num_tokens // tokens_per_row * ceil_div(tokens_per_row, block) * num_slots
    assert slots is not None
    return slots.groups.shape[1] * num_slots
