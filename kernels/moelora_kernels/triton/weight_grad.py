"""dF = hᵀ x: the gradient of a stacked factor, lora_A from (dh, x) and lora_B from (g·s·h, dy)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .job import Job
from .tiles import ceil_div, launch_options, split_count, tile_for, with_wide_rows


@triton.jit
def _add_outer(
    acc, h, x, token, there, h_place, h_mask, column, inside, x_stride,
):  # fmt: skip
    """acc + h[token, ranks]ᵀ x[token, column], the product in the dtype of x."""
    x_place = token.to(tl.int64)[:, None] * x_stride + column[None, :]
    x_tile = tl.load(x + x_place, mask=there[:, None] & inside[None, :], other=0.0)
    h_tile = tl.load(h + h_place, mask=h_mask, other=0.0)
    return tl.dot(tl.trans(h_tile.to(x_tile.dtype)), x_tile, acc, input_precision="ieee")


@triton.jit
def weight_grad_dense_kernel(
    h, x, planes, num_tokens, tokens_per_split, total_rank, d, h_stride, x_stride, plane_stride,
    BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """planes[split] = h[tokens of the split]ᵀ x, [R, d]. Grid (blocks of rank, tiles of d, splits
    of T).
    """
    split = tl.program_id(2)
    rank = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    column = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    used = rank < total_rank
    inside = column < d
    end = tl.minimum((split + 1) * tokens_per_split, num_tokens)
    acc = tl.zeros((BLOCK_R, BLOCK_D), dtype=tl.float32)
    for first in range(split * tokens_per_split, end, BLOCK_T):
        token = first + tl.arange(0, BLOCK_T)
        there = token < end
        h_place = token.to(tl.int64)[:, None] * h_stride + rank[None, :]
        acc = _add_outer(
            acc,
            h,
            x,
            token,
            there,
            h_place,
            there[:, None] & used[None, :],
            column,
            inside,
            x_stride,
        )
    place = split.to(tl.int64) * plane_stride + rank.to(tl.int64)[:, None] * d + column[None, :]
    tl.store(planes + place, acc.to(planes.dtype.element_ty), mask=used[:, None] & inside[None, :])


@triton.jit
def weight_grad_slots_kernel(
    h, x, grad, tokens, bounds, starts, ranks,
    K, E, d, h_stride_t, h_stride_k, h_stride_l, x_stride, blocks_r,
    BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """grad[rows of expert e in linear l] = Σ_{its slots} h[t, slot, l]ᵀ x[t], slot by slot, in
    sorted order.

    Grid (linears · experts · blocks of rank, tiles of d): every row of grad is written by one
    program.
    """
    which = tl.program_id(0) // blocks_r
    block = tl.program_id(0) % blocks_r
    linear = which // E
    expert = which % E
    rank = block * BLOCK_R + tl.arange(0, BLOCK_R)
    column = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    used = rank < tl.load(ranks + which)
    inside = column < d
    acc = tl.zeros((BLOCK_R, BLOCK_D), dtype=tl.float32)
    for slot in range(K):
        group = slot * (E + 1) + expert
        end = tl.load(bounds + group + 1)
        for first in range(tl.load(bounds + group), end, BLOCK_T):
            place = first + tl.arange(0, BLOCK_T)
            there = place < end
            token = tl.load(tokens + place, mask=there, other=0)
            h_rows = token.to(tl.int64) * h_stride_t + slot * h_stride_k + linear * h_stride_l
            h_mask = there[:, None] & used[None, :]
            acc = _add_outer(
                acc,
                h,
                x,
                token,
                there,
                h_rows[:, None] + rank[None, :],
                h_mask,
                column,
                inside,
                x_stride,
            )
    row = tl.load(starts + which) + rank
    place = row.to(tl.int64)[:, None] * d + column[None, :]
    tl.store(grad + place, acc.to(grad.dtype.element_ty), mask=used[:, None] & inside[None, :])


def weight_grad(h: Tensor, x: Tensor, job: Job, dtype: torch.dtype) -> Tensor:
    """hᵀ x stacked as the factor, [Σ_l R_l, d] of dtype; h of `shrink`'s form, x [T, d]."""
    d = x.shape[1]
    if 0 in h.shape or 0 in x.shape:
        return x.new_zeros((job.total_rank, d), dtype=dtype)
    if job.masked:
        return _dense(h, x, job, dtype)
    slots = job.slots
    assert slots is not None
    tile = tile_for("weight_grad", slots.block, job.max_rank, x.dtype, job.tiles)
    blocks_r = ceil_div(job.max_rank, tile.BLOCK_R)
    tile = with_wide_rows(tile, len(job.ranks) * blocks_r, d, x)
    grad = x.new_empty((job.total_rank, d), dtype=dtype)
    weight_grad_slots_kernel[(len(job.ranks) * blocks_r, ceil_div(d, tile.BLOCK_D))](
        h, x, grad, slots.tokens, slots.bounds, job.starts, job.ranks,
        h.shape[1], job.num_experts, d, *h.stride()[:3], x.stride(0), blocks_r,
        **launch_options(tile),
    )  # fmt: skip
    return grad


def _dense(h: Tensor, x: Tensor, job: Job, dtype: torch.dtype) -> Tensor:
    """One launch; and where T was split, the sum of the splits' planes in order."""
    num_tokens, d = x.shape
    total_rank = job.total_rank
    tile = tile_for("weight_grad", num_tokens, total_rank, x.dtype, job.tiles)
    grid_r = ceil_div(total_rank, tile.BLOCK_R)
    grid_d = ceil_div(d, tile.BLOCK_D)
    splits, part = split_count(grid_r * grid_d, num_tokens, tile.BLOCK_T, x.device)
    planes = x.new_empty((splits, total_rank, d), dtype=torch.float32 if splits > 1 else dtype)
    weight_grad_dense_kernel[(grid_r, grid_d, splits)](
        h, x, planes, num_tokens, part, total_rank, d, h.stride(0), x.stride(0), planes.stride(0),
        **launch_options(tile),
    )  # fmt: skip
    return planes[0] if splits == 1 else planes.sum(0).to(dtype)
