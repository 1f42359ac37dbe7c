"""How a sequence router makes vectors `[B, d]` of prompts x `[B, S, d]`, of whose tokens those in
mask `[B, S]` count (None: all).
"""

from __future__ import annotations

import torch
from einops import einsum
from torch import Tensor


def pool_mean(x: Tensor, mask: Tensor | None) -> Tensor:
    """The mean over each prompt's tokens."""
    if mask is None:
        return x.mean(1)
    mask = mask.to(x.dtype)
    return einsum(x, mask, "b s d, b s -> b d") / mask.sum(1, keepdim=True).clamp(min=1)


def pool_last(x: Tensor, mask: Tensor | None) -> Tensor:
    """Each prompt's last token, on whichever side the padding is."""
    if mask is None:
        return x[:, -1]
    last = (torch.arange(x.shape[1], device=x.device) * mask).argmax(1)
    return x.take_along_dim(last[:, None, None], dim=1).squeeze(1)


def pool_attention(x: Tensor, mask: Tensor | None, query: Tensor) -> Tensor:
    """Σ_s a_s x_s with a = softmax_s(x_s · q / √d), q the learned query `[d]`."""
    scores = x @ query.to(x.dtype) * x.shape[2] ** -0.5
    if mask is not None:
        # Not −inf: a row without a prompt would become NaN.
        scores = scores.masked_fill(~mask, torch.finfo(x.dtype).min)
    return einsum(x, scores.softmax(1), "b s d, b s -> b d")
