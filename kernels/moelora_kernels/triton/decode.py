"""Decoding (T ≤ 64): the router rides in the shrink, and every expand chooses the experts in its
prologue.

What the shrink writes for x is one tensor of fp32 planes, a split of d each: the logits, and from
`logits_width` on h of all linears. h of a linear is a view of it that ends with the linear's own
ranks, so that it carries the logits of its x.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..plan import TopK
from .expand import masked_product
from .job import Job
from .router import score_columns, store_scores
from .routing import (
    ALIGNED,
    gate_in_rank_space,
    inverse_norm,
    load_planes,
    logits_width,
    select_experts,
)
from .shrink import multiply_columns
from .tiles import ROUTER_DEPTH, Tile, ceil_div, fitting, launch_options, power_splits, tile_for

# An expand holds all planes of its ranks in registers.
MOST_SPLITS = 8


@triton.jit
def wait_for_inputs(PDL: tl.constexpr):
    """Programmatic dependent launch: a kernel starts while the one before it ends, and waits here.

    Nothing is read before, not even factors: the kernel before may be the one that casts or copies
    them.
    """
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def decode_shrink_kernel(
    x, router, lora_A, planes,
    num_tokens, total_rank, d, d_per_split, C, first_rank,
    x_stride, split_stride, row_stride,
    SQUARES: tl.constexpr, PDL: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """planes[split, t] = (x Wᵀ in fp32, …, x Aᵀ of all linears) over a part of d; the ranks from
    column first_rank on.

    Grid (tiles of tokens, blocks of choices up to first_rank + blocks of rank, splits of d).
    """
    blocks_e = first_rank // BLOCK_E
    block = tl.program_id(1)
    split = tl.program_id(2)
    token = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    there = token < num_tokens
    begin = split * d_per_split
    end = tl.minimum(begin + d_per_split, d)
    planes += split.to(tl.int64) * split_stride
    wait_for_inputs(PDL)
    if block < blocks_e:
        choice = block * BLOCK_E + tl.arange(0, BLOCK_E)
        scores, squares = score_columns(
            x, router, token, there, choice, choice < C, begin, end, x_stride, d, SQUARES, False,
            BLOCK_T, BLOCK_E, BLOCK_K,
        )  # fmt: skip
        store_scores(
            planes, scores, squares, token, there, choice, C, first_rank, row_stride, SQUARES
        )  # fmt: skip
    else:
        rank = (block - blocks_e) * BLOCK_R + tl.arange(0, BLOCK_R)
        used = rank < total_rank
        acc = multiply_columns(
            x, lora_A, token, there, rank, used, begin, end, x_stride, d, x.dtype.element_ty,
            BLOCK_T, BLOCK_R, BLOCK_D,
        )  # fmt: skip
        place = token.to(tl.int64)[:, None] * row_stride + (first_rank + rank)[None, :]
        tl.store(planes + place, acc, mask=there[:, None] & used[None, :])


@triton.jit
def _load_ranks(
    planes, lora_B, experts, scaling, token, there, first, first_rank, total_rank, column, inside,
    d, split_stride, row_stride, SPLITS: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """(h's planes, rows of B, expert and scale) of the ranks from first on, each by one load."""
    rank = first + tl.arange(0, BLOCK_R)
    used = rank < total_rank
    parts = load_planes(
        planes, token, first_rank + rank, there[:, None] & used[None, :], split_stride, row_stride,
        SPLITS,
    )  # fmt: skip
    place = rank.to(tl.int64)[:, None] * d + column[None, :]
    rows = tl.load(lora_B + place, mask=used[:, None] & inside[None, :], other=0.0)
    expert = tl.load(experts + rank, mask=used, other=-1)
    return parts, rows, expert, tl.load(scaling + tl.maximum(expert, 0))


@triton.jit
def _add_ranks(acc, by_expert, h_tile, rows, expert, scale, dtype: tl.constexpr):
    """acc + (g·s·h) B of a block of ranks."""
    gate = gate_in_rank_space(by_expert, expert, scale)
    # Not the product alone: 0 times an infinity or a NaN of an expert not chosen is a NaN.
    return masked_product(acc, tl.where(gate != 0.0, h_tile * gate, 0.0), rows, dtype)


@triton.jit
def decode_expand_kernel(
    planes, lora_B, bias, scaling, experts, ids, weights, out, y,
    num_tokens, first_rank, total_rank, d, d_in, E, C, split_stride, row_stride, out_stride,
    INPUT_NORM: tl.constexpr, SPLITS: tl.constexpr, K: tl.constexpr, NORM: tl.constexpr,
    PDL: tl.constexpr, BLOCK_E: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """y = out + (g·s·h) B for one linear, the routing from the logits' planes; writes it to ids and
    weights.

    Grid (tiles of tokens, tiles of d). Everything that the first BLOCK_R ranks need is asked for
    before the routing is computed, which takes as long as the memory.
    """
    token = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    there = token < num_tokens
    choice = tl.arange(0, BLOCK_E)
    column = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = column < d
    dtype = y.dtype.element_ty
    wait_for_inputs(PDL)
    logits = load_planes(
        planes, token, choice, there[:, None] & (choice < C)[None, :], split_stride, row_stride,
        SPLITS,
    )  # fmt: skip
    parts, rows, expert, scale = _load_ranks(
        planes, lora_B, experts, scaling, token, there, 0, first_rank, total_rank, column, inside,
        d, split_stride, row_stride, SPLITS, BLOCK_R,
    )  # fmt: skip
    place = token.to(tl.int64)[:, None]
    mask = there[:, None] & inside[None, :]
    if out is not None:
        before = tl.load(out + place * out_stride + column[None, :], mask=mask, other=0.0)
    h_tile = tl.sum(parts, axis=0)
    scores = tl.sum(logits, axis=0)
    if INPUT_NORM:
        last = tl.arange(0, 1)
        squares = load_planes(
            planes, token, last + C, there[:, None] & (last >= 0)[None, :], split_stride,
            row_stride, SPLITS,
        )  # fmt: skip
        scores = scores * inverse_norm(tl.sum(squares, axis=0), d_in)
    by_expert = select_experts(
        scores, bias, token, there, ids, weights, None, tl.program_id(1) == 0, E, C, K, NORM,
        BLOCK_E,
    )  # fmt: skip
    acc = tl.zeros((BLOCK_T, BLOCK_D), dtype=tl.float32)
    acc = _add_ranks(acc, by_expert, h_tile, rows, expert, scale, dtype)
    for first in range(BLOCK_R, total_rank, BLOCK_R):
        parts, rows, expert, scale = _load_ranks(
            planes, lora_B, experts, scaling, token, there, first, first_rank, total_rank, column,
            inside, d, split_stride, row_stride, SPLITS, BLOCK_R,
        )  # fmt: skip
        acc = _add_ranks(acc, by_expert, tl.sum(parts, axis=0), rows, expert, scale, dtype)
    if out is not None:
        acc += before.to(tl.float32)
    tl.store(y + place * d + column[None, :], acc.to(dtype), mask=mask)


def decode_shrink(x: Tensor, router: TopK, lora_A: Tensor, job: Job) -> Tensor:
    """fp32 planes [splits, T, logits_width + Σ_l R_l], to be summed in order."""
    num_tokens, d = x.shape
    total_rank = lora_A.shape[0]
    first_rank = logits_width(router)
    tile, grid, splits, part = decode_splits(x, first_rank, total_rank, job.tiles)
    planes = x.new_empty((splits, num_tokens, first_rank + total_rank), dtype=torch.float32)
    if num_tokens:
        decode_shrink_kernel[(*grid, splits)](
            x, router.weight, lora_A, planes,
            num_tokens, total_rank, d, part, router.weight.shape[0], first_rank,
            x.stride(0), *planes.stride()[:2],
            SQUARES=router.input_norm, BLOCK_E=ALIGNED, BLOCK_K=ROUTER_DEPTH,
            **launch_options(tile), **chained(x.device),
        )  # fmt: skip
    return planes


def decode_splits(
    x: Tensor, first_rank: int, total_rank: int, tiles: str
) -> tuple[Tile, tuple[int, int], int, int]:
    """(tile, grid over tokens and blocks, splits of d, a split's part) of `decode_shrink`."""
    num_tokens, d = x.shape
    tile = tile_for("decode_shrink", int(num_tokens), int(total_rank), x.dtype, tiles)
    blocks = first_rank // ALIGNED + ceil_div(int(total_rank), tile.BLOCK_R)
    grid = ceil_div(int(num_tokens), tile.BLOCK_T), blocks
    return tile, grid, *power_splits(grid[0] * grid[1], d, tile.BLOCK_D, x.device, MOST_SPLITS)


def decode_expand(
    planes: Tensor,
    lora_B: Tensor,
    router: TopK,
    ids: Tensor,
    weights: Tensor,
    y: Tensor,
    add: bool,
    job: Job,
) -> None:
    """Write y [T, d_out], or add to it, for one linear's planes [splits, T, … R], and the routing
    to ids and weights [T, K].
    """
    num_tokens, d = y.shape
    if 0 in y.shape:
        return
    tile = tile_for("decode_expand", num_tokens, job.total_rank, y.dtype, job.tiles)
    choices, d_in = router.weight.shape
    tile, lanes = fitted(tile, choices)
    decode_expand_kernel[(ceil_div(num_tokens, tile.BLOCK_T), ceil_div(d, tile.BLOCK_D))](
        planes, lora_B, router.selection_bias, job.scales, job.experts, ids, weights,
        y if add else None, y,
        num_tokens, planes.shape[2] - job.total_rank, job.total_rank, d, d_in, job.num_experts,
        choices, *planes.stride()[:2], y.stride(0),
        INPUT_NORM=router.input_norm, SPLITS=planes.shape[0], K=ids.shape[1], NORM=router.norm,
        BLOCK_E=lanes, **launch_options(tile), **chained(y.device),
    )  # fmt: skip


def fitted(tile: Tile, choices: int) -> tuple[Tile, int]:
    """The tile of decode_expand for this machine, and BLOCK_E."""
    lanes = fitting(choices, 64)
    if torch.version.hip:
        # 128 ranks at once spill there; and each warp, of 64 lanes, needs a token of its own, or
        # Triton 3.6 cannot compile the gather.
        tile = replace(tile, BLOCK_R=min(tile.BLOCK_R, 64))
        lanes = max(lanes, 64 * tile.num_warps // tile.BLOCK_T)
    return tile, lanes


def chained(device: torch.device) -> dict[str, bool]:
    """The launch options of `wait_for_inputs`; NVIDIA chips have it from Hopper on."""
    chains = device.type == "cuda" and _chains(device.index or 0)
    return {"PDL": True, "launch_pdl": True} if chains else {"PDL": False}


@lru_cache
def _chains(index: int) -> bool:
    if torch.version.hip or not isinstance(decode_expand_kernel, triton.JITFunction):
        return False
    return torch.cuda.get_device_capability(index) >= (9, 0)
