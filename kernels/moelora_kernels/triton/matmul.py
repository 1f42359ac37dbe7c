"""Path "matmul": all experts in torch's own matrix products, and what those cannot do in kernels.

h of every expert, gate 0 for those not chosen, as the dense path. A zero gate does not stop an
infinity or a NaN in a factor from reaching every token through a matrix product: those are taken
out of the factor, and come back as NaN through the gate of who chose the expert. Products whose
columns belong to one row of the factor (h = x Aᵀ, u = dy Bᵀ) take the factor as it is.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..autocast import without_autocast
from .job import Job
from .routing import gate_of_ranks
from .tiles import ceil_div, fitting

LAUNCH = {"num_warps": 4, "num_stages": 1, "enable_fp_fusion": True}


@triton.jit
def screened_kernel(
    factor, plain, clean, poison, d, row_stride, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """plain (None: the factor is of their dtype) and clean = factor in their dtype, clean 0 where
    it is not finite; poison NaN in the rows where, else 0.

    Grid (rows).
    """
    row = tl.program_id(0).to(tl.int64)
    bad = 0
    for first in range(0, d, BLOCK_D):
        column = first + tl.arange(0, BLOCK_D)
        inside = column < d
        values = tl.load(factor + row * row_stride + column, mask=inside, other=0.0)
        values = values.to(clean.dtype.element_ty)
        if plain is not None:
            tl.store(plain + row * d + column, values, mask=inside)
        finite = values - values == 0.0
        tl.store(clean + row * d + column, tl.where(finite, values, 0.0), mask=inside)
        bad += tl.sum(tl.where(finite, 0, 1))
    tl.store(poison + row, tl.where(bad > 0, float("nan"), 0.0))


@triton.jit
def gated_kernel(
    h, weights, scaling, row_ids, experts, poison, gated,
    num_tokens, tokens_per_row, total_rank, h_stride,
    K: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """gated [T, R] = g·s·h, 0 for experts not chosen. Grid (tiles of tokens, blocks of rank)."""
    token = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    there = token < num_tokens
    rank = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    inside = rank < total_rank
    mask = there[:, None] & inside[None, :]
    expert = tl.load(experts + rank, mask=inside, other=-2)
    scale = tl.load(scaling + tl.maximum(expert, 0))
    row = token // tokens_per_row
    gate = gate_of_ranks(weights, row_ids, row, there, expert, scale, K)
    place = token.to(tl.int64)[:, None]
    tile = tl.load(h + place * h_stride + rank[None, :], mask=mask, other=0.0).to(tl.float32)
    tile *= gate
    if poison is not None:
        tile += tl.load(poison + rank, mask=inside, other=0.0)[None, :]
    tile = tl.where(gate != 0.0, tile, 0.0)
    tl.store(gated + place * total_rank + rank[None, :], tile.to(gated.dtype.element_ty), mask=mask)


@triton.jit
def poisoned_kernel(
    dh, poison, cast, num_tokens, total_rank, dh_stride,
    BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """cast [T, R] = dh in its dtype, NaN where a poisoned row's dh is not 0.

    Grid (tiles of tokens, blocks of rank).
    """
    token = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    rank = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    inside = rank < total_rank
    mask = (token < num_tokens)[:, None] & inside[None, :]
    place = token.to(tl.int64)[:, None]
    tile = tl.load(dh + place * dh_stride + rank[None, :], mask=mask, other=0.0).to(tl.float32)
    bad = tl.load(poison + rank, mask=inside, other=0.0)[None, :]
    tile = tl.where(tile != 0.0, tile + bad, 0.0)
    tl.store(cast + place * total_rank + rank[None, :], tile.to(cast.dtype.element_ty), mask=mask)


def screened(factor: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """(factor [R, d] in dtype, the same with 0 where it is not finite, [R] fp32: NaN for the rows
    where, else 0); the first is empty where the factor is of dtype itself.
    """
    rows, d = factor.shape
    factor = factor if factor.stride(1) == 1 else factor.contiguous()
    same = factor.dtype == dtype
    plain = factor.new_empty((0, d) if same else (rows, d), dtype=dtype)
    clean = factor.new_empty((rows, d), dtype=dtype)
    poison = factor.new_empty(rows, dtype=torch.float32)
    if rows:
        screened_kernel[(rows,)](
            factor, None if same else plain, clean, poison, d, factor.stride(0),
            BLOCK_D=fitting(d, 4096), **{**LAUNCH, "num_warps": 8},
        )  # fmt: skip
    return plain, clean, poison


def gated(
    h: Tensor, weights: Tensor, poison: Tensor | None, dtype: torch.dtype, job: Job
) -> Tensor:
    """g·s·h [T, R] in dtype, for h [T, R] fp32 and weights [rows, K] fp32."""
    result = h.new_empty(h.shape, dtype=dtype)
    if result.numel():
        block_r = fitting(h.shape[1], 64)
        gated_kernel[(ceil_div(h.shape[0], 32), ceil_div(h.shape[1], block_r))](
            h, weights, job.scales, job.ids, job.experts, poison, result,
            h.shape[0], job.tokens_per_row, h.shape[1], h.stride(0),
            K=job.num_slots, BLOCK_T=32, BLOCK_R=block_r, **LAUNCH,
        )  # fmt: skip
    return result


def poisoned(dh: Tensor, poison: Tensor, dtype: torch.dtype) -> Tensor:
    """dh [T, R] in dtype for the products of the backward pass: NaN for the tokens that chose a
    row that is not finite.
    """
    result = dh.new_empty(dh.shape, dtype=dtype)
    if result.numel():
        block_r = fitting(dh.shape[1], 64)
        poisoned_kernel[(ceil_div(dh.shape[0], 32), ceil_div(dh.shape[1], block_r))](
            dh, poison, result, *dh.shape, dh.stride(0), BLOCK_T=32, BLOCK_R=block_r, **LAUNCH
        )
    return result


def product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """a b, accumulated in fp32, in dtype."""
    # The products of a backward pass that is called under autocast would be cast.
    with without_autocast(a.device.type):
        if dtype == a.dtype:
            return torch.mm(a, b)
        if a.is_cuda and dtype == torch.float32 and torch.version.hip is None:
            return torch.mm(a, b, out_dtype=dtype)
        return torch.mm(a.float(), b.float()).to(dtype)


def add_product(a: Tensor, b: Tensor, out: Tensor | None, y: Tensor | None) -> Tensor:
    """out + a b, written into y where it is given; y may only be out itself."""
    with without_autocast(a.device.type):
        if y is not None:
            return y.addmm_(a, b)
        return torch.mm(a, b) if out is None else torch.addmm(out, a, b)
