"""The products of routers, in IEEE fp32 on every device.

On a GPU torch may be told to round what it multiplies to TF32 (`set_float32_matmul_precision`), a
switch of the whole process. Logits would be off by 5e-4, and rows would go to other experts.
"""

from __future__ import annotations

import torch
from einops import einsum
from moelora_kernels import router_logits
from torch import Tensor, nn


def product(x: Tensor, rows: Tensor, backend: str | None = None) -> Tensor:
    """x rowsᵀ in fp32 (float64 stays), exact also where x has 16 bits: `[N, d]` and `[m, d]` give
    `[N, m]`.

    Args:
        x: of any floating dtype.
        rows: what is multiplied with, cast to that dtype of the result.
        backend: of `moelora_kernels`.
    """
    rows = rows.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
    if x.dtype == rows.dtype and _is_exact(x):
        return nn.functional.linear(x, rows)  # the same, with less around it
    return router_logits(x, rows, backend=backend)


def weighted_sum(x: Tensor, weights: Tensor) -> Tensor:
    """Σ_s w_s x_s of each sequence: x `[B, S, d]`, weights `[B, S]`, the result `[B, d]`."""
    if _is_exact(x):
        return einsum(x, weights, "b s d, b s -> b d")
    # Not as a product of matrices.
    return (x * weights[..., None]).sum(1)


def _is_exact(x: Tensor) -> bool:
    """Whether torch's own products of `x` are never rounded to TF32."""
    return x.device.type == "cpu"
