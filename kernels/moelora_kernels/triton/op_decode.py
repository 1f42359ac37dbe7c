"""The decode kernels as torch operators: the routing is computed inside, no gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor
from torch.library import custom_op

from .decode import decode_expand as run_decode_expand
from .decode import decode_shrink as run_decode_shrink
from .decode import decode_splits
from .fused import fused as run_fused
from .layout import layout, scales
from .op import dense_rows


@custom_op("moelora::decode_shrink", mutates_args=())
def decode_shrink(x: Tensor, router: Tensor, lora_A: Tensor, tiles: str) -> tuple[Tensor, Tensor]:
    """(logits [splits, T, E] = x Wᵀ, h [splits, T, Σ_l R_l] = x Aᵀ), fp32 planes."""
    return run_decode_shrink(dense_rows(x), router.contiguous(), lora_A.contiguous(), tiles)


@decode_shrink.register_fake
def _(x, router, lora_A, tiles):
    splits = decode_splits(x, lora_A, tiles)[2]
    shape = (splits, x.shape[0])
    return router.new_empty((*shape, router.shape[0])), router.new_empty((*shape, lora_A.shape[0]))


@custom_op("moelora::decode_expand_", mutates_args=("ids", "weights", "y"))
def decode_expand_(
    logits: Tensor,
    h: Tensor,
    lora_B: Tensor,
    bias: Tensor | None,
    norm: bool,
    scaling: Sequence[float],
    site: Sequence[int],
    ids: Tensor,
    weights: Tensor,
    y: Tensor,
    add: bool,
    tiles: str,
) -> None:
    """y (+)= (g·s·h) B for one linear; the routing is written to ids and weights [T, K]."""
    place = layout(tuple(site), len(scaling), y.device)
    scale = scales(tuple(scaling), y.device)
    out = y if add else None
    run_decode_expand(
        logits, h, lora_B.contiguous(), bias, norm, scale, place, ids, weights, out, y, tiles
    )


@custom_op("moelora::fused_", mutates_args=("ids", "weights", "y"))
def fused_(
    x: Tensor,
    router: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    bias: Tensor | None,
    norm: bool,
    scaling: Sequence[float],
    site: Sequence[int],
    ids: Tensor,
    weights: Tensor,
    y: Tensor,
    add: bool,
    tiles: str,
) -> None:
    """y (+)= the mixture of x, router and all, in one launch; the routing is written to ids and
    weights.
    """
    place = layout(tuple(site), len(scaling), y.device)
    scale = scales(tuple(scaling), y.device)
    run_fused(
        dense_rows(x),
        lora_A.contiguous(),
        lora_B.contiguous(),
        scale,
        place,
        ids,
        weights,
        y if add else None,
        y,
        None,
        1,
        tiles,
        (router.contiguous(), bias, norm),
    )


OPERATORS: tuple[Callable, ...] = (decode_shrink, decode_expand_, fused_)
