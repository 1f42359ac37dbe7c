"""How a sequence router makes one vector of a prompt: its mean, its last token, or learned
attention over it.
"""

from __future__ import annotations

import torch
from einops import einsum, rearrange, repeat
from torch import Tensor


def pool_mean(x: Tensor, mask: Tensor | None) -> Tensor:
    """The mean over each prompt's tokens.

    Args:
        x: prompts `[B, S, d]`.
        mask: which tokens count, `[B, S]` bool; None for all.
    """
    if mask is None:
        return x.mean(1)
    mask = mask.to(x.dtype)
    return einsum(x, mask, "b s d, b s -> b d") / mask.sum(1, keepdim=True).clamp(min=1)


def pool_last(x: Tensor, mask: Tensor | None) -> Tensor:
    """Each prompt's last token, on whichever side the padding is.

    Args:
        x: prompts `[B, S, d]`.
        mask: which tokens count, `[B, S]` bool; None for all.
    """
    if mask is None:
        return x[:, -1]
    positions = torch.arange(x.shape[1], device=x.device)
    last = (positions * mask).argmax(1)
    return rearrange(x.gather(1, repeat(last, "b -> b 1 d", d=x.shape[2])), "b 1 d -> b d")


def pool_attention(x: Tensor, mask: Tensor | None, query: Tensor) -> Tensor:
    """Σ_s a_s x_s with a = softmax_s(x_s · q / √d) over each prompt's tokens.

    Args:
        x: prompts `[B, S, d]`.
        mask: which tokens count, `[B, S]` bool; None for all.
        query: the learned query q `[d]`.
    """
    scores = x @ query.to(x.dtype) * x.shape[2] ** -0.5
    if mask is not None:
        # Not −inf: a row without a prompt would become NaN.
        scores = scores.masked_fill(~mask, torch.finfo(x.dtype).min)
    return einsum(x, scores.softmax(1), "b s d, b s -> b d")
