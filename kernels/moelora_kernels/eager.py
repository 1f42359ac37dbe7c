"""Plain PyTorch: two autograd functions over the three products of each path."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

from . import inference
from .dispatch import MASKED
from .layout import Layout
from .paths import PRODUCTS, path_weights
from .plan import Plan
from .router import logits as logits
from .sharing import of_all_experts, of_slots


def shrink(x: Tensor, lora_A: Tensor, layout: Layout, plan: Plan) -> tuple[Tensor, ...]:
    """h_l = x A_lᵀ for every linear l of the site, of the experts that the path computes.

    x [T, d_in], lora_A [Σ_l R_l, d_in]. h_l: dense [T, R_l]; grouped and sequence
    [rows, tokens_per_row, K, max_e r_e].
    """
    if torch.is_grad_enabled() and (x.requires_grad or lora_A.requires_grad):
        return _Shrink.apply(x, lora_A, layout, plan)
    if inference.applies(layout, plan):
        return inference.shrink(x, lora_A, layout, plan)
    return PRODUCTS[plan.path].down(x, lora_A.to(x.dtype), layout, plan)


def shrink_shared(x: Tensor, lora_A: Tensor, layout: Layout, plan: Plan) -> tuple[Tensor, ...]:
    """As `shrink`, for a lora_A [Σ_l r_l, d_in] that the experts of a linear share."""
    h = linear(x, lora_A.to(x.dtype))
    if plan.path in MASKED:
        return of_all_experts(h, layout)
    return of_slots(h, layout, plan.rows, plan.tokens_per_row, plan.num_slots)


def expand(
    h: Tensor,
    lora_B: Tensor,
    layout: Layout,
    plan: Plan,
    out: Tensor | None = None,
    *,
    inplace: bool = False,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """y = out + Σ_e w_e · s_e · h_e B_e; h from `shrink`, lora_B [R, d_out], out [..., d_out]."""
    if out is None and dtype is not None and dtype != h.dtype:
        h = h.to(dtype)
    inplace = inplace and out is not None and _can_be_written(out)
    if not torch.is_grad_enabled() and inference.applies(layout, plan):
        return inference.expand(h, lora_B, layout, plan, out, inplace)
    inputs = (out, h, lora_B, path_weights(plan))
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs):
        return _Expand.apply(*inputs, layout, plan, inplace)
    return _expand(*inputs, layout, plan, inplace)


def _can_be_written(out: Tensor) -> bool:
    """Whether a product is added where out lies: all of a tensor, or, where nobody learns, some
    columns of a wider one, as a merged linear of several gives them.
    """
    if out.is_contiguous():
        return True
    if torch.is_grad_enabled() or out.dim() != 2:
        return False
    return out.stride(1) == 1 and out.stride(0) >= out.shape[1]


class _Shrink(torch.autograd.Function):
    """h_l = x A_lᵀ; dx = Σ_l dh_l A_l, dA_l = dh_lᵀ x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, lora_A: Tensor, layout: Layout, plan: Plan) -> Any:
        ctx.save_for_backward(x, lora_A)
        ctx.layout = layout
        ctx.plan = plan
        return PRODUCTS[plan.path].down(x, lora_A.to(x.dtype), layout, plan)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *dh: Tensor) -> Any:
        x, lora_A = ctx.saved_tensors
        products = PRODUCTS[ctx.plan.path]
        dx = dA = None
        if ctx.needs_input_grad[0]:
            dx = products.up(dh, lora_A.to(x.dtype), ctx.layout, ctx.plan)
        if ctx.needs_input_grad[1]:
            dA = products.outer(dh, x, ctx.layout, ctx.plan).to(lora_A.dtype)
        return dx, dA, None, None


class _Expand(torch.autograd.Function):
    """y = out + (g·s·h) B; u = dy Bᵀ, dg = s⟨u, h⟩, dh = g·s·u, dB = (g·s·h)ᵀ dy, dout = dy.

    out comes first: of a view written in place, autograd takes the first gradient for its own.
    """

    @staticmethod
    def forward(
        ctx: Any,
        out: Tensor | None,
        h: Tensor,
        lora_B: Tensor,
        weights: Tensor,
        layout: Layout,
        plan: Plan,
        inplace: bool,
    ) -> Tensor:
        ctx.save_for_backward(h, lora_B, weights)
        ctx.layout = layout
        ctx.plan = plan
        if inplace:
            ctx.mark_dirty(out)
        return _expand(out, h, lora_B, weights, layout, plan, inplace)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Any:
        h, lora_B, weights = ctx.saved_tensors
        layout = ctx.layout
        plan = ctx.plan
        need_out, need_h, need_B, need_weights = ctx.needs_input_grad[:4]
        products = PRODUCTS[plan.path]
        scale = products.scale(weights, layout, plan)
        gate = weights * scale
        flat = dy.reshape(plan.num_tokens, dy.shape[-1])
        dh = dB = dweights = None
        if need_h or need_weights:
            (u,) = products.down(flat, lora_B.to(dy.dtype), layout, plan)
            if need_h:
                dh = products.weighted(u, gate, layout, plan).to(h.dtype)
            if need_weights:
                terms = u.to(weights.dtype) * h
                dweights = products.collect(terms, layout, plan) * scale
        if need_B:
            gated = products.weighted(h, gate, layout, plan).to(dy.dtype)
            dB = products.outer((gated,), flat, layout, plan).to(lora_B.dtype)
        return dy if need_out else None, dh, dB, dweights, None, None, None


def _expand(
    out: Tensor | None,
    h: Tensor,
    lora_B: Tensor,
    weights: Tensor,
    layout: Layout,
    plan: Plan,
    inplace: bool,
) -> Tensor:
    """The sum itself: the gate in fp32, one cast, the product in the dtype of out."""
    products = PRODUCTS[plan.path]
    dtype = h.dtype if out is None else out.dtype
    scaled = weights * products.scale(weights, layout, plan)
    gated = products.weighted(h, scaled, layout, plan).to(dtype)
    flat = None if out is None else out.reshape(plan.num_tokens, out.shape[-1])
    y = products.up((gated,), lora_B.to(dtype), layout, plan, flat, inplace)
    if out is None:
        return y
    return out if inplace else y.view(out.shape)
