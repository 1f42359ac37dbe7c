"""How a sequence router makes one vector of a prompt: its mean, its last token, or learned
attention over it.
"""

from __future__ import annotations

import torch
from torch import Tensor


def pool_mean(x: Tensor, mask: Tensor | None) -> Tensor:
    """Mean of x `[B, S, d]` over the tokens in mask `[B, S]` bool (None: all), `[B, d]`."""
    if mask is None:
        return x.mean(1)
    mask = mask.to(x.dtype)
    return torch.einsum("bsd,bs->bd", x, mask) / mask.sum(1, keepdim=True).clamp(min=1)


def pool_last(x: Tensor, mask: Tensor | None) -> Tensor:
    """The last token in mask `[B, S]` bool (None: all) of x `[B, S, d]`, on whichever side the
    padding is, `[B, d]`.
    """
    if mask is None:
        return x[:, -1]
    positions = torch.arange(x.shape[1], device=x.device)
    last = (positions * mask).argmax(1)
    return x.gather(1, last[:, None, None].expand(-1, 1, x.shape[2])).squeeze(1)


def pool_attention(x: Tensor, mask: Tensor | None, query: Tensor) -> Tensor:
    """Σ_s a_s x_s with a = softmax_s(x_s · q / √d) over the tokens in mask; x `[B, S, d]`, q `[d]`
    → `[B, d]`.
    """
    scores = x @ query.to(x.dtype) * x.shape[2] ** -0.5
    if mask is not None:
        # Not −inf: a row without a prompt would become NaN.
        scores = scores.masked_fill(~mask, torch.finfo(x.dtype).min)
    return torch.einsum("bsd,bs->bd", x, scores.softmax(1))
