"""Between u = dy Bᵀ and the gradients: dh = g·s·u, dw = s⟨u, h⟩, and g·s·h for lora_B's gradient,
in one launch.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .job import Job
from .routing import gate_of_ranks
from .shrink import sum_planes
from .tiles import ceil_div, launch_options, tile_for


@triton.jit
def gate_grad_dense_kernel(
    planes, h, weights, scaling, row_ids, experts, dh, gated, dweights,
    num_tokens, tokens_per_row, total_rank, splits, plane_stride, h_stride,
    K: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """dh, gated [T, R]; dweights [T, K] = Σ_{ranks of the slot's expert} s u h. Grid (tiles of
    tokens).
    """
    token = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    there = token < num_tokens
    row = token // tokens_per_row
    lane_k = tl.arange(0, BLOCK_K)
    acc = tl.zeros((BLOCK_T, BLOCK_K), dtype=tl.float32)
    for first in range(0, total_rank, BLOCK_R):
        rank = first + tl.arange(0, BLOCK_R)
        inside = rank < total_rank
        mask = there[:, None] & inside[None, :]
        place = token.to(tl.int64)[:, None] * total_rank + rank[None, :]
        u = sum_planes(planes, place, mask, splits, plane_stride)
        h_tile = tl.load(
            h + token.to(tl.int64)[:, None] * h_stride + rank[None, :], mask=mask, other=0.0
        )
        h_tile = h_tile.to(tl.float32)
        expert = tl.load(experts + rank, mask=inside, other=-2)
        scale = tl.load(scaling + tl.maximum(expert, 0))
        gate = gate_of_ranks(weights, row_ids, row, there, expert, scale, K)
        # An infinity or a NaN of an expert not chosen stays there.
        du = tl.where(gate != 0.0, u * gate, 0.0)
        gated_h = tl.where(gate != 0.0, h_tile * gate, 0.0)
        tl.store(dh + place, du.to(dh.dtype.element_ty), mask=mask)
        tl.store(gated + place, gated_h.to(gated.dtype.element_ty), mask=mask)
        terms = u * h_tile * scale[None, :]
        for slot in tl.static_range(K):
            chosen = tl.load(row_ids + row * K + slot, mask=there, other=-1).to(tl.int32)
            own = tl.sum(tl.where(chosen[:, None] == expert[None, :], terms, 0.0), axis=1)
            acc += tl.where(lane_k[None, :] == slot, own[:, None], 0.0)
    place = token.to(tl.int64)[:, None] * K + lane_k[None, :]
    tl.store(dweights + place, acc, mask=there[:, None] & (lane_k < K)[None, :])


@triton.jit
def gate_grad_slots_kernel(
    planes, h, weights, scaling, row_ids, dh, gated, dweights,
    num_tokens, tokens_per_row, K, max_rank, splits, plane_stride, h_stride_t, h_stride_k,
    BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """dh, gated [T, K, max rank]; dweights [T, K] = s⟨u, h⟩. Grid (tiles of tokens, slots)."""
    slot = tl.program_id(1)
    token = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    there = token < num_tokens
    row = token // tokens_per_row
    expert = tl.load(row_ids + row * K + slot, mask=there, other=-1)
    scale = tl.load(scaling + tl.maximum(expert, 0))
    gate = tl.load(weights + row * K + slot, mask=there & (expert >= 0), other=0.0) * scale
    acc = tl.zeros((BLOCK_T,), dtype=tl.float32)
    for first in range(0, max_rank, BLOCK_R):
        rank = first + tl.arange(0, BLOCK_R)
        mask = there[:, None] & (rank < max_rank)[None, :]
        place = (token.to(tl.int64) * K + slot)[:, None] * max_rank + rank[None, :]
        u = sum_planes(planes, place, mask, splits, plane_stride)
        h_rows = h + token.to(tl.int64)[:, None] * h_stride_t + slot * h_stride_k
        h_tile = tl.load(h_rows + rank[None, :], mask=mask, other=0.0).to(tl.float32)
        tl.store(dh + place, (u * gate[:, None]).to(dh.dtype.element_ty), mask=mask)
        tl.store(gated + place, (h_tile * gate[:, None]).to(gated.dtype.element_ty), mask=mask)
        acc += tl.sum(u * h_tile, axis=1)
    tl.store(dweights + token.to(tl.int64) * K + slot, acc * scale, mask=there)


def gate_grad(
    planes: Tensor, h: Tensor, weights: Tensor, dtype: torch.dtype, job: Job
) -> tuple[Tensor, Tensor, Tensor]:
    """(dh of h's shape and dtype, g·s·h in dtype, dweights [rows, K] fp32) of u's planes, for one
    linear.
    """
    num_tokens = h.shape[0]
    num_slots = job.num_slots
    dh = h.new_empty(h.shape)
    gated = h.new_empty(h.shape, dtype=dtype)
    dweights = weights.new_empty((num_tokens, num_slots))
    if h.numel() and num_slots:
        width = job.total_rank if job.masked else job.max_rank
        tile = tile_for("gate_grad", num_tokens, width, torch.float32, job.tiles)
        options = {k: v for k, v in launch_options(tile).items() if k != "BLOCK_D"}
        sums = (planes.shape[0], planes.stride(0))
        fixed = (planes, h, weights, job.scales, job.ids)
        grid_t = ceil_div(num_tokens, tile.BLOCK_T)
        if job.masked:
            gate_grad_dense_kernel[(grid_t,)](
                *fixed, job.experts, dh, gated, dweights,
                num_tokens, job.tokens_per_row, width, *sums, h.stride(0),
                K=num_slots, BLOCK_K=triton.next_power_of_2(num_slots), **options,
            )  # fmt: skip
        else:
            gate_grad_slots_kernel[(grid_t, num_slots)](
                *fixed, dh, gated, dweights,
                num_tokens, job.tokens_per_row, num_slots, width, *sums, *h.stride()[:2], **options,
            )  # fmt: skip
    else:
        for empty in (dh, gated, dweights):
            empty.zero_()
    if job.tokens_per_row != 1:
        dweights = dweights.view(job.ids.shape[0], job.tokens_per_row, num_slots).sum(1)
    return dh, gated, dweights
