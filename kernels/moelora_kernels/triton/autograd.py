"""Gradients: each half of the mixture is the other one's backward pass, and a weight gradient; and
a router's logits.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import operators as ops
from .job import Job, one_expert

# From here on a copy of a factor in the dtype of the activations costs less than to cast it anew
# wherever it is read: in both passes, by each tile of tokens.
TOKENS_TO_CAST_FOR = 256


def in_dtype(factor: Tensor, dtype: torch.dtype, num_tokens: int, job: Job) -> Tensor:
    """The factor in the dtype of the activations where many tokens read each row, else as it is.

    Made anew in each forward pass and kept for its backward pass, so that it cannot be stale.
    """
    tokens = num_tokens if job.masked else num_tokens * job.num_slots // job.num_experts
    cast = job.path == "matmul" or tokens >= TOKENS_TO_CAST_FOR
    return factor.to(dtype) if cast else factor


def screened(
    factor: Tensor, dtype: torch.dtype, num_tokens: int, job: Job
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(the factor, the same without what is not finite, its poison or None where the kernels see to
    it), as `in_dtype`.
    """
    if job.path != "matmul":
        factor = in_dtype(factor, dtype, num_tokens, job)
        return factor, factor, None
    plain, clean, poison = ops.screened(factor, dtype)
    return factor if factor.dtype == dtype else plain, clean, poison


class Shrink(torch.autograd.Function):
    """h = x Aᵀ; dx = Σ_l dh_l A_l, dA_l = dh_lᵀ x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, lora_A: Tensor, job: Job) -> Tensor:
        factor, clean, poison = screened(lora_A, x.dtype, x.shape[0], job)
        ctx.save_for_backward(x, clean, poison)
        ctx.job = job
        ctx.dtype = lora_A.dtype
        return ops.shrink(x, factor, job)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dh: Tensor) -> tuple:
        x, factor, poison = ctx.saved_tensors
        dx = dA = None
        if poison is not None:
            dh = ops.poisoned(dh, poison, x.dtype)
        if ctx.needs_input_grad[0]:
            dx = ops.input_grad(dh, factor, x.dtype, ctx.job)
        if ctx.needs_input_grad[1]:
            dA = ops.weight_grad(dh, x, ctx.dtype, ctx.job)
        return dx, dA, None


class Expand(torch.autograd.Function):
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
        job: Job,
        dtype: torch.dtype,
        inplace: bool,
    ) -> Tensor:
        factor, clean, poison = screened(lora_B, dtype, h.shape[0], job)
        ctx.save_for_backward(h, factor, weights)
        ctx.job = job
        ctx.dtype = lora_B.dtype
        if out is None or not inplace:
            return ops.expand(h, clean, poison, weights, out, dtype, job)
        ctx.mark_dirty(out)
        ops.expand_(h, clean, poison, weights, out.view(h.shape[0], factor.shape[1]), job)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple:
        h, factor, weights = ctx.saved_tensors
        job = ctx.job
        need_out, need_h, need_B, need_weights = ctx.needs_input_grad[:4]
        dh = dB = dweights = None
        if need_h or need_B or need_weights:
            flat = dy.reshape(h.shape[0], factor.shape[1])
            dh, gated, dweights = ops.expand_backward(flat, h, factor, weights, job)
            if need_B:
                by_linear = gated if job.masked else gated.unsqueeze(2)
                dB = ops.weight_grad(by_linear, flat, ctx.dtype, job)
        return dy if need_out else None, dh, dB, dweights, None, None, None


class Logits(torch.autograd.Function):
    """x Wᵀ, x read once and never cast in memory; dx in the dtype of x, dW in fp32."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return ops.router_product(x, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dlogits: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        dx = dweight = None
        if ctx.needs_input_grad[0]:
            # The product in the dtype of x, of which dx keeps no more.
            dx = ops.input_grad(dlogits, weight, x.dtype, one_expert(weight, len(x)))
        if ctx.needs_input_grad[1]:
            dweight = ops.router_grad(dlogits, x)
        return dx, dweight


def logits(x: Tensor, weight: Tensor) -> Tensor:
    """x Wᵀ [T, E] fp32; x [T, d] of 16 or 32 bits, W [E, d] fp32."""
    return Logits.apply(x, weight)
