"""The kernels as torch operators, with shapes for tracing and gradients: what torch.compile and
autograd see.

Operators take tensors, numbers and lists only. `site` is the E + 1 offsets of each of a site's
linears, one after another; `slots` the four arrays of a `SlotMap`, or none; `tiles` the name of a
tuned table, or "".
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from .expand import expand as run_expand
from .fused import fused as run_fused
from .gate_grad import gate_grad as run_gate_grad
from .layout import layout, scales, sizes
from .shrink import h_shape, shrink_planes
from .slot_map import SlotMap
from .weight_grad import weight_grad as run_weight_grad


@custom_op("moelora::shrink", mutates_args=())
def shrink(
    x: Tensor, factor: Tensor, ids: Tensor, slots: Sequence[Tensor], site: Sequence[int],
    num_experts: int, path: str, tokens_per_row: int, block: int, tiles: str,
) -> Tensor:  # fmt: skip
    """h = x Fᵀ fp32 of all linears of a site: dense [T, R], else [T, K, L, max rank]."""
    place = layout(tuple(site), num_experts, x.device)
    x = dense_rows(x)
    factor = factor.contiguous()
    ids = ids.contiguous()
    planes = shrink_planes(x, factor, ids, _map(slots, block), place, path, tokens_per_row, tiles)
    return planes[0] if planes.shape[0] == 1 else planes.sum(0)


@shrink.register_fake
def _(x, factor, ids, slots, site, num_experts, path, tokens_per_row, block, tiles):
    shape = h_shape(x.shape[0], ids.shape[1], path, sizes(tuple(site), num_experts))
    return x.new_empty(shape, dtype=torch.float32)


@custom_op("moelora::input_grad", mutates_args=())
def input_grad(
    dh: Tensor, factor: Tensor, ids: Tensor, slots: Sequence[Tensor], site: Sequence[int],
    num_experts: int, path: str, tokens_per_row: int, block: int, tiles: str, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """dx = Σ_l dh_l A_l [T, d_in] of dtype."""
    place = layout(tuple(site), num_experts, dh.device)
    dh = dense_rows(dh)
    factor = factor.contiguous()
    slot_map = _map(slots, block)
    return run_expand(
        dh,
        factor,
        None,
        None,
        ids.contiguous(),
        slot_map,
        place,
        path,
        tokens_per_row,
        dtype,
        tiles,
    )


@input_grad.register_fake
def _(dh, factor, ids, slots, site, num_experts, path, tokens_per_row, block, tiles, dtype):
    return dh.new_empty((dh.shape[0], factor.shape[1]), dtype=dtype)


@custom_op("moelora::weight_grad", mutates_args=())
def weight_grad(
    h: Tensor, x: Tensor, slots: Sequence[Tensor], site: Sequence[int],
    num_experts: int, path: str, block: int, tiles: str, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """hᵀ x, stacked as the factor, [R, d] of dtype."""
    place = layout(tuple(site), num_experts, x.device)
    h = dense_rows(h)
    x = dense_rows(x)
    return run_weight_grad(h, x, _map(slots, block), place, path, dtype, tiles)


@weight_grad.register_fake
def _(h, x, slots, site, num_experts, path, block, tiles, dtype):
    return x.new_empty((sizes(tuple(site), num_experts)[1], x.shape[1]), dtype=dtype)


@custom_op("moelora::expand", mutates_args=())
def expand(
    h: Tensor, lora_B: Tensor, weights: Tensor, out: Tensor | None, ids: Tensor,
    slots: Sequence[Tensor], site: Sequence[int], scaling: Sequence[float], path: str,
    tokens_per_row: int, block: int, tiles: str, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """out + Σ_e w_e s_e h_e B_e, [T, d_out] of dtype."""
    return _expand_into(
        h,
        lora_B,
        weights,
        out,
        ids,
        slots,
        site,
        scaling,
        path,
        tokens_per_row,
        block,
        tiles,
        dtype,
    )


@expand.register_fake
def _(
    h, lora_B, weights, out, ids, slots, site, scaling, path, tokens_per_row, block, tiles, dtype
):
    return h.new_empty((h.shape[0], lora_B.shape[1]), dtype=dtype)


@custom_op("moelora::expand_", mutates_args=("out",))
def expand_(
    h: Tensor, lora_B: Tensor, weights: Tensor, out: Tensor, ids: Tensor, slots: Sequence[Tensor],
    site: Sequence[int], scaling: Sequence[float], path: str,
    tokens_per_row: int, block: int, tiles: str,
) -> None:  # fmt: skip
    """`expand` into out; without gradients."""
    _expand_into(
        h,
        lora_B,
        weights,
        out,
        ids,
        slots,
        site,
        scaling,
        path,
        tokens_per_row,
        block,
        tiles,
        out.dtype,
        out,
    )


@custom_op("moelora::fused", mutates_args=())
def fused(
    x: Tensor, lora_A: Tensor, lora_B: Tensor, weights: Tensor, out: Tensor | None, ids: Tensor,
    site: Sequence[int], scaling: Sequence[float],
    tokens_per_row: int, tiles: str, dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(y [T, d_out] of dtype, h [T, R] fp32) of one linear on the dense path, in one launch; R ≤
    256.
    """
    place = layout(tuple(site), len(scaling), x.device)
    y, h = _empty_fused(x, lora_A, lora_B, dtype)
    out = None if out is None else dense_rows(out)
    run_fused(
        dense_rows(x), lora_A.contiguous(), lora_B.contiguous(), scales(tuple(scaling), x.device),
        place, ids.contiguous(), weights.contiguous(), out, y, h, tokens_per_row, tiles,
    )  # fmt: skip
    return y, h


@fused.register_fake
def _(x, lora_A, lora_B, weights, out, ids, site, scaling, tokens_per_row, tiles, dtype):
    return _empty_fused(x, lora_A, lora_B, dtype)


def _empty_fused(
    x: Tensor, lora_A: Tensor, lora_B: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    y = x.new_empty((x.shape[0], lora_B.shape[1]), dtype=dtype)
    return y, x.new_empty((x.shape[0], lora_A.shape[0]), dtype=torch.float32)


@custom_op("moelora::expand_backward", mutates_args=())
def expand_backward(
    dy: Tensor, h: Tensor, lora_B: Tensor, weights: Tensor, ids: Tensor, slots: Sequence[Tensor],
    site: Sequence[int], scaling: Sequence[float], path: str,
    tokens_per_row: int, block: int, tiles: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(dh, g·s·h in the dtype of dy, dweights) of u = dy Bᵀ."""
    place = layout(tuple(site), len(scaling), dy.device)
    dy = dense_rows(dy)
    h = dense_rows(h)
    weights = weights.contiguous()
    ids = ids.contiguous()
    planes = shrink_planes(
        dy, lora_B.contiguous(), ids, _map(slots, block), place, path, tokens_per_row, tiles
    )
    scale = scales(tuple(scaling), dy.device)
    return run_gate_grad(
        planes, h, weights, scale, ids, place, path, tokens_per_row, dy.dtype, tiles
    )


@expand_backward.register_fake
def _(dy, h, lora_B, weights, ids, slots, site, scaling, path, tokens_per_row, block, tiles):
    return h.new_empty(h.shape), h.new_empty(h.shape, dtype=dy.dtype), torch.empty_like(weights)


def _expand_into(
    h,
    lora_B,
    weights,
    out,
    ids,
    slots,
    site,
    scaling,
    path,
    tokens_per_row,
    block,
    tiles,
    dtype,
    y=None,
) -> Tensor:
    place = layout(tuple(site), len(scaling), h.device)
    if out is not None and y is None:
        out = dense_rows(out)
    gate = (weights.contiguous(), scales(tuple(scaling), h.device))
    return run_expand(
        dense_rows(h), lora_B.contiguous(), out, gate, ids.contiguous(), _map(slots, block), place,
        path, tokens_per_row, dtype, tiles, y,
    )  # fmt: skip


def dense_rows(tensor: Tensor) -> Tensor:
    """The tensor with its last axis side by side, as the kernels read it; other strides stay."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _map(slots: Sequence[Tensor], block: int) -> SlotMap | None:
    return SlotMap(block, *slots) if slots else None


def _keep_shrink(ctx: Any, inputs: tuple, output: Any) -> None:
    x, factor, ids, slots, *ctx.fixed = inputs
    ctx.num_slots = len(slots)
    ctx.save_for_backward(x, factor, ids, *slots)


def _backward_of_shrink(ctx: Any, dh: Tensor) -> tuple:
    """dx = Σ_l dh_l A_l, dA_l = dh_lᵀ x."""
    x, factor, ids, *slots = ctx.saved_tensors
    site, num_experts, path, tokens_per_row, block, tiles = ctx.fixed
    dx = dA = None
    if ctx.needs_input_grad[0]:
        dx = input_grad(
            dh, factor, ids, slots, site, num_experts, path, tokens_per_row, block, tiles, x.dtype
        )
    if ctx.needs_input_grad[1]:
        dA = weight_grad(dh, x, slots, site, num_experts, path, block, tiles, factor.dtype)
    return dx, dA, None, [None] * ctx.num_slots, None, None, None, None, None, None


def _keep_expand(ctx: Any, inputs: tuple, output: Any) -> None:
    h, lora_B, weights, out, ids, slots, *ctx.fixed, _ = inputs
    ctx.num_slots = len(slots)
    ctx.out_dtype = None if out is None else out.dtype
    ctx.save_for_backward(h, lora_B, weights, ids, *slots)


def _backward_of_expand(ctx: Any, dy: Tensor) -> tuple:
    """u = dy Bᵀ, dg = s⟨u, h⟩, dh = g·s·u, dB = (g·s·h)ᵀ dy, dout = dy."""
    h, lora_B, weights, ids, *slots = ctx.saved_tensors
    site, scaling, path, tokens_per_row, block, tiles = ctx.fixed
    dh, gated, dweights = expand_backward(
        dy, h, lora_B, weights, ids, slots, site, scaling, path, tokens_per_row, block, tiles
    )
    dB = None
    if ctx.needs_input_grad[1]:
        by_linear = gated if path == "dense" else gated.unsqueeze(2)
        dB = weight_grad(by_linear, dy, slots, site, len(scaling), path, block, tiles, lora_B.dtype)
    dout = dy if ctx.needs_input_grad[3] else None
    return dh, dB, dweights, dout, None, [None] * ctx.num_slots, *(None,) * 7


def _keep_fused(ctx: Any, inputs: tuple, output: Any) -> None:
    x, lora_A, lora_B, weights, out, ids, *ctx.fixed, _ = inputs
    ctx.has_out = out is not None
    ctx.save_for_backward(x, lora_A, lora_B, weights, ids, output[1])


def _backward_of_fused(ctx: Any, dy: Tensor, dh: Tensor) -> tuple:
    """The backward passes of expand and shrink on the dense path; h is there for them alone."""
    x, lora_A, lora_B, weights, ids, h = ctx.saved_tensors
    site, scaling, tokens_per_row, tiles = ctx.fixed
    experts = len(scaling)
    where = ("dense", tokens_per_row, 0, tiles)
    dh, gated, dweights = expand_backward(dy, h, lora_B, weights, ids, [], site, scaling, *where)
    dx = dA = dB = None
    if ctx.needs_input_grad[0]:
        dx = input_grad(dh, lora_A, ids, [], site, experts, *where, x.dtype)
    if ctx.needs_input_grad[1]:
        dA = weight_grad(dh, x, [], site, experts, "dense", 0, tiles, lora_A.dtype)
    if ctx.needs_input_grad[2]:
        dB = weight_grad(gated, dy, [], site, experts, "dense", 0, tiles, lora_B.dtype)
    return dx, dA, dB, dweights, dy if ctx.has_out else None, *(None,) * 6


fused.register_autograd(_backward_of_fused, setup_context=_keep_fused)
shrink.register_autograd(_backward_of_shrink, setup_context=_keep_shrink)
expand.register_autograd(_backward_of_expand, setup_context=_keep_expand)

OPERATORS: tuple[Callable, ...] = (
    shrink,
    input_grad,
    weight_grad,
    expand,
    expand_,
    expand_backward,
    fused,
)
