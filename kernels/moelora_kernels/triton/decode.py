"""Decoding (T ≤ 64): the router rides in the shrink, and every expand chooses the experts in its
prologue.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .expand import multiply_masked_rows, store_rows
from .job import Job
from .routing import gate_in_rank_space, select_experts
from .shrink import multiply_columns, sum_planes
from .tiles import Tile, ceil_div, fitting, launch_options, split_count, tile_for


@triton.jit
def decode_shrink_kernel(
    x, router, lora_A, logits, planes,
    num_tokens, total_rank, d, d_per_split, E, x_stride, logits_stride, plane_stride,
    BLOCK_E: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """logits[split] = x Wᵀ (in fp32) and planes[split] = x Aᵀ of all linears, each over a part of
    d.

    Grid (tiles of tokens, 1 + blocks of rank, splits of d): block 0 is the router's.
    """
    split = tl.program_id(2)
    token = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    there = token < num_tokens
    begin = split * d_per_split
    end = tl.minimum(begin + d_per_split, d)
    if tl.program_id(1) == 0:
        expert = tl.arange(0, BLOCK_E)
        scores = multiply_columns(
            x, router, token, there, expert, expert < E, begin, end, x_stride, d, tl.float32,
            BLOCK_T, BLOCK_E, BLOCK_D,
        )  # fmt: skip
        scores_at = token.to(tl.int64)[:, None] * E + expert[None, :]
        tl.store(
            logits + split * logits_stride + scores_at,
            scores,
            mask=there[:, None] & (expert < E)[None, :],
        )
    else:
        rank = (tl.program_id(1) - 1) * BLOCK_R + tl.arange(0, BLOCK_R)
        used = rank < total_rank
        acc = multiply_columns(
            x, lora_A, token, there, rank, used, begin, end, x_stride, d, x.dtype.element_ty,
            BLOCK_T, BLOCK_R, BLOCK_D,
        )  # fmt: skip
        place = token.to(tl.int64)[:, None] * total_rank + rank[None, :]
        tl.store(planes + split * plane_stride + place, acc, mask=there[:, None] & used[None, :])


@triton.jit
def decode_expand_kernel(
    logits, h, lora_B, bias, scaling, experts, ids, weights, out, y,
    num_tokens, total_rank, d, E, splits, logits_stride, plane_stride, h_stride, out_stride,
    K: tl.constexpr, NORM: tl.constexpr, BLOCK_E: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """y = out + (g·s·h) B for one linear, the routing from the logits' planes; writes it to ids and
    weights.

    Grid (tiles of tokens, tiles of d); BLOCK_R holds all ranks of the linear.
    """
    token = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    there = token < num_tokens
    expert = tl.arange(0, BLOCK_E)
    rank = tl.arange(0, BLOCK_R)
    place = token.to(tl.int64)[:, None] * E + expert[None, :]
    scores = sum_planes(
        logits, place, there[:, None] & (expert < E)[None, :], splits, logits_stride
    )
    first = tl.program_id(1) == 0
    by_expert = select_experts(scores, bias, token, there, ids, weights, first, E, K, NORM, BLOCK_E)
    gate = gate_in_rank_space(by_expert, experts, scaling, total_rank, BLOCK_E, BLOCK_R)
    used = rank < total_rank
    place = token.to(tl.int64)[:, None] * h_stride + rank[None, :]
    gated = sum_planes(h, place, there[:, None] & used[None, :], splits, plane_stride)
    gated = tl.where(gate != 0.0, gated * gate, 0.0)
    column = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = column < d
    acc = tl.zeros((BLOCK_T, BLOCK_D), dtype=tl.float32)
    acc = multiply_masked_rows(
        acc, gated, lora_B, rank, used, column, inside, d, y.dtype.element_ty
    )
    store_rows(y, out, acc, token, there, column, inside, d, out_stride)


def decode_shrink(x: Tensor, router: Tensor, lora_A: Tensor, tiles: str) -> tuple[Tensor, Tensor]:
    """(logits [splits, T, E], h [splits, T, Σ_l R_l]), fp32 planes to be summed in order."""
    num_tokens, d = x.shape
    total_rank = lora_A.shape[0]
    num_experts = router.shape[0]
    tile, grid, splits, part = decode_splits(x, lora_A, tiles)
    logits = router.new_empty((splits, num_tokens, num_experts))
    planes = router.new_empty((splits, num_tokens, total_rank))
    if num_tokens:
        decode_shrink_kernel[(*grid, splits)](
            x, router, lora_A, logits, planes,
            num_tokens, total_rank, d, part, num_experts, x.stride(0), logits.stride(0),
            planes.stride(0), BLOCK_E=fitting(num_experts, 64), **launch_options(tile),
        )  # fmt: skip
    return logits, planes


def decode_splits(x: Tensor, lora_A: Tensor, tiles: str) -> tuple[Tile, tuple[int, int], int, int]:
    """(tile, grid over tokens and blocks, splits of d, a split's part) of `decode_shrink`."""
    num_tokens, d = x.shape
    total_rank = lora_A.shape[0]
    tile = tile_for("decode_shrink", int(num_tokens), total_rank, x.dtype, tiles)
    grid = ceil_div(int(num_tokens), tile.BLOCK_T), 1 + ceil_div(total_rank, tile.BLOCK_R)
    return tile, grid, *split_count(grid[0] * grid[1], d, tile.BLOCK_D, x.device)


def decode_expand(
    logits: Tensor,
    h: Tensor,
    lora_B: Tensor,
    bias: Tensor | None,
    norm: bool,
    ids: Tensor,
    weights: Tensor,
    out: Tensor | None,
    y: Tensor,
    job: Job,
) -> None:
    """Write y [T, d_out] for one linear's h [splits, T, R], and the routing to ids and weights [T,
    K].
    """
    num_tokens, d = y.shape
    if 0 in y.shape:
        return
    tile = tile_for("decode_expand", num_tokens, job.total_rank, y.dtype, job.tiles)
    decode_expand_kernel[(ceil_div(num_tokens, tile.BLOCK_T), ceil_div(d, tile.BLOCK_D))](
        logits, h, lora_B, bias, job.scales, job.experts, ids, weights, out, y,
        num_tokens, job.total_rank, d, job.num_experts, h.shape[0],
        logits.stride(0), h.stride(0), h.stride(1), 0 if out is None else out.stride(0),
        K=ids.shape[1], NORM=norm, BLOCK_E=fitting(job.num_experts, 64), **launch_options(tile),
    )  # fmt: skip
