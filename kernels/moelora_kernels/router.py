"""A router's logits in fp32, of activations that stay in their own dtype."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def logits(x: Tensor, weight: Tensor) -> Tensor:
    """x Wᵀ [T, E] in the dtype of W; x [T, d], W [E, d] fp32 (fp64 for fp64 x)."""
    return _Logits.apply(x, weight)


class _Logits(torch.autograd.Function):
    """x Wᵀ. What is kept for the backward pass is x as it is: a cast copy would be twice its size,
    at each router.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return torch.nn.functional.linear(x.to(weight.dtype), weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dlogits: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        dx = dweight = None
        if ctx.needs_input_grad[0]:
            dx = torch.mm(dlogits, weight).to(x.dtype)
        if ctx.needs_input_grad[1]:
            dweight = torch.mm(dlogits.T, x.to(weight.dtype))
        return dx, dweight
