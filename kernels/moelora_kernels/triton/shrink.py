"""x Fᵀ into rank space: h of the forward pass, and u = dy Bᵀ of the backward one."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .job import Job
from .slot_map import table, tokens_of_tile
from .tiles import ceil_div, launch_options, split_count, splits_in_cache, tile_for, with_block_t


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
        # Sequence: slots side by side read the same tokens. Grouped: they are sorted apart, and all
        # of a split, the slowest axis, find its part of x in the cache where that fits.
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


def shrink_planes(x: Tensor, factor: Tensor, job: Job) -> Tensor:
    """h in fp32 planes [splits, *job.h_shape], to be summed in order; x [T, d], factor [R, d]."""
    num_tokens, d = x.shape
    shape = job.h_shape(num_tokens)
    if 0 in shape:
        return x.new_zeros((1, *shape), dtype=torch.float32)
    width = job.total_rank if job.masked else job.max_rank
    block = job.slots.block if job.slots is not None and job.path == "grouped" else None
    tokens = block or (job.tokens_per_row if job.path == "sequence" else num_tokens)
    tile = with_block_t(tile_for("shrink", tokens, width, x.dtype, job.tiles), block)
    grid_t = tiles_of_tokens(num_tokens, job, tile.BLOCK_T)
    grid_r = ceil_div(width, tile.BLOCK_R) * (1 if job.masked else job.num_linears)
    at_least = 1
    if job.path == "grouped":
        ranks = width * job.num_linears
        at_least = splits_in_cache(num_tokens, d, x.itemsize, job.num_slots, ranks)
    splits, d_per_split = split_count(grid_t * grid_r, d, tile.BLOCK_D, x.device, at_least)
    planes = x.new_empty((splits, *shape), dtype=torch.float32)
    shrink_kernel[(grid_t, grid_r, splits)](
        x, factor, planes,
        job.ids, *table(job.slots), job.starts, job.ranks,
        num_tokens, job.tokens_per_row, job.slots.groups.shape[1] if job.slots else 0,
        job.num_slots, job.num_experts, job.total_rank, d, d_per_split, x.stride(0),
        planes.stride(0),
        PATH=job.path, MAX_RANK=job.max_rank, L=job.num_linears, **launch_options(tile),
    )  # fmt: skip
    return planes


def tiles_of_tokens(num_tokens: int, job: Job, block: int) -> int:
    """How many tiles of tokens a shrink has: for every slot where a tile has one."""
    if job.path == "dense":
        return ceil_div(num_tokens, block)
    return tiles_of_slot(num_tokens, job, block) * job.num_slots


def tiles_of_slot(num_tokens: int, job: Job, block: int) -> int:
    """How many tiles of tokens one slot has, on the paths grouped and sequence."""
    if job.path == "sequence":
        return num_tokens // job.tokens_per_row * ceil_div(job.tokens_per_row, block)
    assert job.slots is not None
    return job.slots.groups.shape[1]
