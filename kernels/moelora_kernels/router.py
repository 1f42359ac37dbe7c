"""A router's logits in fp32, of activations that stay in their own dtype.

On a GPU torch may be told to round fp32 products to TF32 (`set_float32_matmul_precision`), which
has 11 significant bits: logits would be off by 5e-4, and tokens would go elsewhere. Here products
there are of numbers that TF32 holds exactly, so it has nothing to round; fp32 numbers are split
into three such. To switch TF32 off meanwhile would change other threads' products.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# The bits of an fp32 number that TF32 keeps.
TF32 = -(1 << 13)


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
        if not _rounds(weight):
            return torch.nn.functional.linear(x.to(weight.dtype), weight)
        return product(x, weight.T)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dlogits: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        dx = dweight = None
        if ctx.needs_input_grad[0]:
            dx = product(dlogits, weight).to(x.dtype)
        if ctx.needs_input_grad[1]:
            dweight = product(dlogits.T, x)
        return dx, dweight


def product(a: Tensor, b: Tensor) -> Tensor:
    """a b of two matrices, in the wider of their dtypes, whatever torch is told about TF32."""
    dtype = torch.promote_types(a.dtype, b.dtype)
    if not _rounds(a) or dtype != torch.float32:
        return torch.mm(a.to(dtype), b.to(dtype))
    # What is left out is 2^-33 of the product; the smallest terms first.
    terms = [
        torch.mm(left, right)
        for i, left in enumerate(_parts(a))
        for j, right in enumerate(_parts(b))
        if i + j < 3
    ]
    return torch.stack(terms[::-1]).sum(0) if len(terms) > 1 else terms[0]


def _rounds(tensor: Tensor) -> bool:
    """Whether fp32 products of the tensor may be rounded to TF32."""
    return tensor.is_cuda


def _parts(values: Tensor) -> list[Tensor]:
    """fp32 numbers whose sum the values are, each of TF32's 11 bits; 16-bit ones are such."""
    if values.dtype != torch.float32:
        return [values.float()]
    parts = []
    for _ in range(2):
        parts.append((values.view(torch.int32) & TF32).view(torch.float32))
        values = values - parts[-1]
    return [*parts, values]
