"""Out of rank space: y = out + (g·s·h) B of the forward pass, and dx = dh A of the backward one."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .job import Job
from .matmul import gated
from .routing import gate_of_ranks
from .shrink import tiles_of_slot
from .slot_map import table, tokens_of_tile
from .tiles import ceil_div, columns_at_once, launch_options, out_tiles, tile_for, with_block_t


@triton.jit
def _dense_h(
    h, weights, row_ids, experts, scaling, token, there, first, total_rank, tokens_per_row,
    h_stride, K: tl.constexpr, GATED: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """h [tokens, ranks first …] times its gate, fp32."""
    rank = first + tl.arange(0, BLOCK_R)
    inside = rank < total_rank
    place = token.to(tl.int64)[:, None] * h_stride + rank[None, :]
    tile = tl.load(h + place, mask=there[:, None] & inside[None, :], other=0.0).to(tl.float32)
    if GATED:
        expert = tl.load(experts + rank, mask=inside, other=-2)
        scale = tl.load(scaling + tl.maximum(expert, 0))
        gate = gate_of_ranks(weights, row_ids, token // tokens_per_row, there, expert, scale, K)
        # Not the product alone: 0 times an infinity or a NaN of an expert not chosen is a NaN.
        tile = tl.where(gate != 0.0, tile * gate, 0.0)
    return tile


@triton.jit
def multiply_rows(acc, h_tile, factor, row, used, column, inside, d, dtype: tl.constexpr):
    """acc + h F[row, column], the product in dtype."""
    place = row.to(tl.int64)[:, None] * d + column[None, :]
    f_tile = tl.load(factor + place, mask=used[:, None] & inside[None, :], other=0.0)
    return tl.dot(h_tile.to(dtype), f_tile.to(dtype), acc, input_precision="ieee")


@triton.jit
def multiply_masked_rows(acc, h_tile, factor, row, used, column, inside, d, dtype: tl.constexpr):
    """As `multiply_rows`, for h that is 0 where a token did not choose the row's expert: an
    infinity or a NaN in a row makes NaN of the tokens that did, and of no others.
    """
    place = row.to(tl.int64)[:, None] * d + column[None, :]
    f_tile = tl.load(factor + place, mask=used[:, None] & inside[None, :], other=0.0)
    return masked_product(acc, h_tile, f_tile, dtype)


@triton.jit
def masked_product(acc, h_tile, f_tile, dtype: tl.constexpr):
    """acc + h F of `multiply_masked_rows`, for rows that are loaded."""
    f_tile = f_tile.to(dtype)
    finite = f_tile - f_tile == 0.0
    cast = h_tile.to(dtype)
    acc = tl.dot(cast, tl.where(finite, f_tile, 0.0), acc, input_precision="ieee")
    bad = tl.max(tl.where(finite, 0, 1), axis=1)
    if tl.max(bad, axis=0) > 0:
        hit = tl.where((bad[None, :] > 0) & (h_tile != 0.0), 1, 0)
        acc = tl.where(tl.max(hit, axis=1)[:, None] > 0, float("nan"), acc)
    return acc


# With a loop of one known turn the compilers hold everything at once, and spill.
@triton.jit(do_not_specialize=["tiles_d"])
def expand_dense_kernel(
    h, factor, out, y, weights, scaling, row_ids, experts,
    num_tokens, tokens_per_row, total_rank, d, h_stride, out_stride, tiles_d,
    K: tl.constexpr, GATED: tl.constexpr, RESIDENT: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """y = out + (g·s·h) F over all R rows, those of experts not chosen with gate 0; in the dtype of
    y.

    Grid (tiles of tokens, blocks of d). A program writes tiles_d tiles of d; RESIDENT: the gated h
    of all ranks is read and weighted once for them.
    """
    lane_r = tl.arange(0, BLOCK_R)
    token = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    there = token < num_tokens
    dtype = y.dtype.element_ty
    if RESIDENT:
        h_tile = _dense_h(
            h, weights, row_ids, experts, scaling, token, there, 0, total_rank, tokens_per_row,
            h_stride, K, GATED, BLOCK_R,
        ).to(dtype)  # fmt: skip
    for tile_d in range(tiles_d):
        column = (tl.program_id(1) * tiles_d + tile_d) * BLOCK_D + tl.arange(0, BLOCK_D)
        inside = column < d
        acc = tl.zeros((BLOCK_T, BLOCK_D), dtype=tl.float32)
        if RESIDENT:
            acc = multiply_masked_rows(
                acc, h_tile, factor, lane_r, lane_r < total_rank, column, inside, d, dtype
            )
        else:
            for first in range(0, total_rank, BLOCK_R):
                gated = _dense_h(
                    h, weights, row_ids, experts, scaling, token, there, first, total_rank,
                    tokens_per_row, h_stride, K, GATED, BLOCK_R,
                )  # fmt: skip
                rank = first + lane_r
                acc = multiply_masked_rows(
                    acc, gated, factor, rank, rank < total_rank, column, inside, d, dtype
                )
        store_rows(y, out, acc, token, there, column, inside, d, out_stride)


@triton.jit
def store_rows(y, out, acc, token, there, column, inside, d, out_stride):
    """y[token, column] = out[token, column] + acc, rounded once."""
    mask = there[:, None] & inside[None, :]
    token = token.to(tl.int64)[:, None]
    if out is not None:
        acc += tl.load(out + token * out_stride + column[None, :], mask=mask, other=0.0).to(
            tl.float32
        )
    tl.store(y + token * d + column[None, :], acc.to(y.dtype.element_ty), mask=mask)


@triton.jit
def _slot_h(
    h, weights, scaling, token, there, row, slot, linear, first, rank_of, expert, K,
    h_stride_t, h_stride_k, h_stride_l, GATED: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """w·s·h [tokens, ranks first …] of one slot, fp32."""
    rank = first + tl.arange(0, BLOCK_R)
    rows = h + token.to(tl.int64)[:, None] * h_stride_t + slot * h_stride_k + linear * h_stride_l
    mask = there[:, None] & (rank < rank_of)[None, :]
    tile = tl.load(rows + rank[None, :], mask=mask, other=0.0).to(tl.float32)
    if GATED:
        weight = tl.load(weights + row * K + slot, mask=there, other=0.0)
        tile *= (weight * tl.load(scaling + tl.maximum(expert, 0)))[:, None]
    return tile


@triton.jit
def _add_slot(
    acc, h, factor, weights, scaling, starts, ranks, token, there, row, slot, expert, column,
    inside, d, K, E, h_stride_t, h_stride_k, h_stride_l,
    L: tl.constexpr, GATED: tl.constexpr, BLOCK_R: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    """acc + (w·s·h)[slot] F of the rows of one expert, in each linear of the site."""
    for linear in range(L):
        which = linear * E + tl.maximum(expert, 0)
        rank_of = tl.where(expert >= 0, tl.load(ranks + which), 0)
        start = tl.load(starts + which)
        for first in range(0, rank_of, BLOCK_R):
            h_tile = _slot_h(
                h, weights, scaling, token, there, row, slot, linear, first, rank_of, expert, K,
                h_stride_t, h_stride_k, h_stride_l, GATED, BLOCK_R,
            )  # fmt: skip
            rank = first + tl.arange(0, BLOCK_R)
            own = rank < rank_of
            acc = multiply_rows(acc, h_tile, factor, start + rank, own, column, inside, d, dtype)
    return acc


@triton.jit(do_not_specialize=["tiles_d"])
def expand_slots_kernel(
    h, factor, out, y, weights, scaling,
    row_ids, tokens, bounds, groups, firsts, starts, ranks,
    tokens_per_row, capacity, pass_slot, K, E, d, h_stride_t, h_stride_k, h_stride_l, out_stride,
    first_column, end_column, tiles_d,
    PATH: tl.constexpr, L: tl.constexpr, GATED: tl.constexpr, RESIDENT: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """y = out + Σ (w·s·h)[t, slot] F[rows of the slot's expert], in the dtype of y, for the columns
    from first_column to end_column.

    Grid (tiles of tokens, blocks of d); a program writes tiles_d tiles of d. Sequence: all K slots
    of a row in one program. Grouped: one slot (pass_slot) a launch, so that no two programs meet in
    a row of y; a token without an expert there gets y = out, and the next pass reads y as its out.
    RESIDENT: a grouped program reads its h, for all ranks of its expert, once.
    """
    tile = tl.program_id(0)
    token, there, expert = tokens_of_tile(
        tile, pass_slot, row_ids, tokens, bounds, groups, firsts, tokens_per_row, capacity, K, E,
        PATH, BLOCK_T,
    )  # fmt: skip
    dtype = y.dtype.element_ty
    row = token // tokens_per_row
    rank = tl.arange(0, BLOCK_R)
    if RESIDENT:
        rank_of = tl.where(expert >= 0, tl.load(ranks + tl.maximum(expert, 0)), 0)
        start = tl.load(starts + tl.maximum(expert, 0))
        h_tile = _slot_h(
            h, weights, scaling, token, there, row, pass_slot, 0, 0, rank_of, expert, K,
            h_stride_t, h_stride_k, h_stride_l, GATED, BLOCK_R,
        ).to(dtype)  # fmt: skip
    for tile_d in range(tiles_d):
        nth = tl.program_id(1) * tiles_d + tile_d
        column = first_column + nth * BLOCK_D + tl.arange(0, BLOCK_D)
        inside = column < end_column
        acc = tl.zeros((BLOCK_T, BLOCK_D), dtype=tl.float32)
        if RESIDENT:
            acc = multiply_rows(
                acc, h_tile, factor, start + rank, rank < rank_of, column, inside, d, dtype
            )
        elif PATH == "grouped":
            acc = _add_slot(
                acc, h, factor, weights, scaling, starts, ranks, token, there, row, pass_slot,
                expert, column, inside, d, K, E, h_stride_t, h_stride_k, h_stride_l, L, GATED,
                BLOCK_R, dtype,
            )  # fmt: skip
        else:
            for slot in range(K):
                chosen = tl.load(row_ids + (tile // tl.cdiv(tokens_per_row, BLOCK_T)) * K + slot)
                acc = _add_slot(
                    acc, h, factor, weights, scaling, starts, ranks, token, there, row, slot,
                    chosen.to(tl.int32), column, inside, d, K, E, h_stride_t, h_stride_k,
                    h_stride_l, L, GATED, BLOCK_R, dtype,
                )  # fmt: skip
        store_rows(y, out, acc, token, there, column, inside, d, out_stride)


def expand(
    h: Tensor,
    factor: Tensor,
    out: Tensor | None,
    weights: Tensor | None,
    dtype: torch.dtype,
    job: Job,
    y: Tensor | None = None,
) -> Tensor:
    """out + Σ (w·s·h) F as y [T, d] of dtype; without weights [rows, K] h is taken as it is.

    h of `shrink`'s form, of any strides but that of the last axis; y may be out itself.
    """
    num_tokens = h.shape[0]
    d = factor.shape[1]
    y = h.new_empty((num_tokens, d), dtype=dtype) if y is None else y
    if 0 in y.shape:
        return y
    if 0 in h.shape:
        return y.zero_() if out is None else y.copy_(out)
    if job.masked:
        _launch_dense(h, factor, out, y, weights, job)
    else:
        _launch_slots(h, factor, out, y, weights, job)
    return y


def _launch_dense(h, factor, out, y, weights, job: Job) -> None:
    """One launch; before it h is weighted and cast once for all tiles of d, where none holds it."""
    num_tokens, d = y.shape
    tile = tile_for("expand", num_tokens, job.total_rank, y.dtype, job.tiles)
    grid_t = ceil_div(num_tokens, tile.BLOCK_T)
    grid_d = ceil_div(d, tile.BLOCK_D)
    tiles_d = out_tiles(grid_t * grid_d, y.device)
    resident = job.total_rank <= tile.BLOCK_R
    if not resident and num_tokens > 64:
        h = h.to(y.dtype) if weights is None else gated(h, weights, None, y.dtype, job)
        weights = None
    expand_dense_kernel[(grid_t, ceil_div(grid_d, tiles_d))](
        h, factor, out, y, weights, job.scales, job.ids, job.experts,
        num_tokens, job.tokens_per_row, job.total_rank, d, h.stride(0),
        0 if out is None else out.stride(0), tiles_d,
        K=job.num_slots, GATED=weights is not None, RESIDENT=resident, **launch_options(tile),
    )  # fmt: skip


def _launch_slots(h, factor, out, y, weights, job: Job) -> None:
    """One launch; of the grouped path one for each slot, in order, and each part of y's columns."""
    num_tokens, d = y.shape
    grouped = job.path == "grouped"
    block = job.slots.block if grouped and job.slots is not None else None
    tokens = block or job.tokens_per_row
    tile = with_block_t(tile_for("expand_slots", tokens, job.max_rank, y.dtype, job.tiles), block)
    passes = job.num_slots if grouped else 1
    columns = columns_at_once(num_tokens, d, y.itemsize, tile.BLOCK_D) if passes > 1 else d
    grid_t = tiles_of_slot(num_tokens, job, tile.BLOCK_T)
    grid_d = ceil_div(min(columns, d), tile.BLOCK_D)
    tiles_d = out_tiles(grid_t * grid_d, y.device) if grouped else 1
    resident = grouped and job.num_linears == 1 and job.max_rank <= tile.BLOCK_R
    for first in range(0, d, columns):
        source = out
        for slot in range(passes):
            expand_slots_kernel[(grid_t, ceil_div(grid_d, tiles_d))](
                h, factor, source, y, weights, job.scales, job.ids, *table(job.slots),
                job.starts, job.ranks, job.tokens_per_row,
                job.slots.groups.shape[1] if job.slots else 0,
                slot, job.num_slots, job.num_experts, d, *h.stride()[:3],
                0 if source is None else source.stride(0), first, min(first + columns, d), tiles_d,
                PATH=job.path, L=job.num_linears, GATED=weights is not None, RESIDENT=resident,
                **launch_options(tile),
            )  # fmt: skip
            source = y
