"""A router's logits to fp32 accuracy on tensor cores: fp32 numbers as three of 16 bits, as ranks of
a dense shrink.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .job import one_expert
from .operators import input_grad, shrink, weight_grad

# Significant bits of a 16-bit float: each part holds that many more of the fp32 number's 24.
BITS = {torch.bfloat16: 8, torch.float16: 11}


def logits(x: Tensor, weight: Tensor) -> Tensor:
    """x Wᵀ [T, E] fp32; x [T, d] of 16 or 32 bits, W [E, d] fp32."""
    return _Logits.apply(x, weight)


class _Logits(torch.autograd.Function):
    """x Wᵀ, x read once and never cast in memory; dx in the dtype of x, dW in fp32."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        parts, scales = _parts(weight, x.dtype)
        factor = parts.flatten(0, 1)
        h = shrink(x, factor, one_expert(factor, len(x)))
        return torch.einsum("tpe,p->te", h.view(len(x), len(scales), len(weight)), scales)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dlogits: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        parts, scales = _parts(dlogits, x.dtype)
        by_token = parts.transpose(0, 1).flatten(1)
        dx = dweight = None
        if ctx.needs_input_grad[0]:
            # In 16 bits, of which dx keeps no more: the first parts do.
            dx = input_grad(dlogits, weight, x.dtype, one_expert(weight, len(x)))
        if ctx.needs_input_grad[1]:
            job = one_expert(by_token.T, len(x))
            grads = weight_grad(by_token, x, torch.float32, job)
            dweight = torch.einsum("ped,p->ed", grads.view(len(scales), *weight.shape), scales)
        return dx, dweight


def _parts(values: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(parts [P, …] of dtype, scales [P] fp32): values = Σ_p scales[p] · parts[p] to about fp32's
    accuracy.

    Each part is what the ones before left over, scaled up to where the dtype is dense.
    """
    if dtype == torch.float32:
        return values.unsqueeze(0), values.new_ones(1)
    if not values.numel():
        return values.to(dtype).expand(3, *values.shape), values.new_ones(3)
    largest = values.abs().amax().clamp(min=torch.finfo(torch.float32).tiny)
    rest = values / largest
    parts = []
    step = 2.0 ** BITS[dtype]
    for _ in range(3):
        parts.append(rest.to(dtype))
        rest = (rest - parts[-1].float()) * step
    powers = torch.arange(3, device=values.device, dtype=torch.float32)
    return torch.stack(parts), largest * step**-powers
