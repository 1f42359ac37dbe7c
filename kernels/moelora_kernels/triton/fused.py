"""The whole mixture of one linear in a single launch: x → h → weights → y, all experts masked."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .expand import gate_of_ranks, multiply_rows, store_rows
from .layout import Layout
from .routing import gate_in_rank_space, select_experts
from .shrink import multiply_columns
from .tiles import ceil_div, fitting, launch_options, tile_for


@triton.jit
def fused_kernel(
    x, lora_A, lora_B, router, bias, scaling, experts, row_ids, weights, out, y, h,
    num_tokens, tokens_per_row, total_rank, d_in, d_out, E, x_stride, out_stride,
    K: tl.constexpr, NORM: tl.constexpr, BLOCK_E: tl.constexpr, TILES_D: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """y = out + (g·s·(x Aᵀ)) B. Grid (tiles of tokens, parts of d_out); BLOCK_R holds all ranks.

    Each part of d_out computes h anew: one part where tokens abound, many where a token must fill
    the chip. With a router [E, d_in] fp32 the routing is computed too, and row_ids and weights are
    written; else they are read. h [T, R] fp32 is kept for the backward pass where it is given.
    """
    token = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    there = token < num_tokens
    rank = tl.arange(0, BLOCK_R)
    used = rank < total_rank
    dtype = y.dtype.element_ty
    hidden = multiply_columns(
        x, lora_A, token, there, rank, used, 0, d_in, x_stride, d_in, x.dtype.element_ty, BLOCK_T,
        BLOCK_R, BLOCK_D,
    )  # fmt: skip
    if h is not None:  # noqa: SIM102 -- known when compiling, the other is not
        if tl.program_id(1) == 0:
            place = token.to(tl.int64)[:, None] * total_rank + rank[None, :]
            tl.store(h + place, hidden, mask=there[:, None] & used[None, :])
    if router is not None:
        lane = tl.arange(0, BLOCK_E)
        logits = multiply_columns(
            x, router, token, there, lane, lane < E, 0, d_in, x_stride, d_in, tl.float32, BLOCK_T,
            BLOCK_E, BLOCK_D,
        )  # fmt: skip
        first = tl.program_id(1) == 0
        by_expert = select_experts(
            logits, bias, token, there, row_ids, weights, first, E, K, NORM, BLOCK_E
        )
        gate = gate_in_rank_space(by_expert, experts, scaling, total_rank, BLOCK_E, BLOCK_R)
    else:
        expert = tl.load(experts + rank, mask=used, other=-2)
        scale = tl.load(scaling + tl.maximum(expert, 0))
        gate = gate_of_ranks(weights, row_ids, token // tokens_per_row, there, expert, scale, K)
    gated = (hidden * gate).to(dtype)
    for tile_d in range(TILES_D):
        column = (tl.program_id(1) * TILES_D + tile_d) * BLOCK_D + tl.arange(0, BLOCK_D)
        inside = column < d_out
        acc = tl.zeros((BLOCK_T, BLOCK_D), dtype=tl.float32)
        acc = multiply_rows(acc, gated, lora_B, rank, used, column, inside, d_out, dtype)
        store_rows(y, out, acc, token, there, column, inside, d_out, out_stride)


def fused(
    x: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: Tensor,
    site: Layout,
    expert_ids: Tensor,
    weights: Tensor,
    out: Tensor | None,
    y: Tensor,
    h: Tensor | None,
    tokens_per_row: int,
    tiles: str,
    router: tuple[Tensor, Tensor | None, bool] | None = None,
) -> None:
    """Write y [T, d_out], h [T, R] if given, and with a router (weight, bias, norm) also the
    routing.
    """
    num_tokens, d_out = y.shape
    if 0 in y.shape:
        return
    tile = tile_for("fused", num_tokens, site.total_rank, x.dtype, tiles)
    parts = 1 if num_tokens > 64 else ceil_div(d_out, tile.BLOCK_D)
    tiles_d = ceil_div(ceil_div(d_out, tile.BLOCK_D), parts)
    router_weight, bias, norm = router or (None, None, False)
    fused_kernel[(ceil_div(num_tokens, tile.BLOCK_T), parts)](
        x, lora_A, lora_B, router_weight, bias, scaling, site.experts, expert_ids, weights, out, y,
        h, num_tokens, tokens_per_row, site.total_rank, x.shape[1], d_out, site.num_experts,
        x.stride(0), 0 if out is None else out.stride(0),
        K=expert_ids.shape[1], NORM=norm, BLOCK_E=fitting(site.num_experts, 1024), TILES_D=tiles_d,
        **launch_options(tile),
    )  # fmt: skip
