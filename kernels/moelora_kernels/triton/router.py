"""A router's logits x Wᵀ to fp32's accuracy: IEEE fp32 products, or of much bf16 x three on tensor
cores.

An fp32 number is the sum of three of bf16 (8 bits each), x is one already: three exact products,
added in fp32. The numbers are split in registers: nothing but x, W and the result is in memory.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..plan import TopK
from .routing import logits_width, top_k
from .tiles import Tile, ceil_div, launch_options, power_splits, split_count, tile_for

# Up to here the plain fp32 product takes no longer than to read W.
FEW_TOKENS = 512


@triton.jit
def three_parts(values):
    """fp32 values as three bf16 numbers whose sum they are, the largest first."""
    high = values.to(tl.bfloat16)
    rest = values - high.to(tl.float32)
    middle = rest.to(tl.bfloat16)
    return high, middle, (rest - middle.to(tl.float32)).to(tl.bfloat16)


@triton.jit
def multiply_exactly(a, b, acc, SPLIT: tl.constexpr):
    """acc + a b in fp32; SPLIT: of bf16 b, by the three parts of a, the smallest first."""
    if SPLIT:
        high, middle, low = three_parts(a)
        acc = tl.dot(low, b, acc)
        acc = tl.dot(middle, b, acc)
        return tl.dot(high, b, acc)
    else:
        return tl.dot(a, b.to(tl.float32), acc, input_precision="ieee")


@triton.jit
def score_columns(
    x, weight, token, there, choice, real, begin, end, x_stride, d,
    SQUARES: tl.constexpr, SPLIT: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """(W[choice] x[token]ᵀ [choices, tokens], Σ x² [tokens] if SQUARES) of columns begin to end."""
    x_rows = x + token.to(tl.int64)[:, None] * x_stride
    weight_rows = weight + choice.to(tl.int64)[:, None] * d
    acc = tl.zeros((BLOCK_E, BLOCK_T), dtype=tl.float32)
    squares = tl.zeros((BLOCK_T,), dtype=tl.float32)
    for first in range(begin, end, BLOCK_D):
        column = first + tl.arange(0, BLOCK_D)
        inside = (column < end)[None, :]
        x_tile = tl.load(x_rows + column[None, :], mask=there[:, None] & inside, other=0.0)
        w_tile = tl.load(weight_rows + column[None, :], mask=real[:, None] & inside, other=0.0)
        wide = x_tile.to(tl.float32)
        acc = multiply_exactly(w_tile, tl.trans(x_tile if SPLIT else wide), acc, SPLIT)
        if SQUARES:
            squares += tl.sum(wide * wide, axis=1)
    return acc, squares


@triton.jit
def store_scores(
    planes, acc, squares, token, there, choice, C, width, row_stride, SQUARES: tl.constexpr,
):  # fmt: skip
    """The logits [choices, tokens] to columns 0 … of a split's plane; SQUARES: the squares to
    column C. The rest of its width becomes 0.
    """
    if SQUARES:
        acc = tl.where(choice[:, None] == C, squares[None, :], acc)
    row = token.to(tl.int64) * row_stride
    mask = (choice < width)[:, None] & there[None, :]
    tl.store(planes + row[None, :] + choice[:, None], acc, mask=mask)


@triton.jit
def router_kernel(
    x, weight, planes, num_tokens, d, d_per_split, C, width, x_stride, split_stride, row_stride,
    SQUARES: tl.constexpr, SPLIT: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """planes[split, t, :C] = W x[t] over a part of d, fp32; SQUARES: and [t, C] = Σ x².

    Grid (tiles of tokens, blocks of the width, splits of d).
    """
    split = tl.program_id(2)
    token = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    there = token < num_tokens
    choice = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    begin = split * d_per_split
    end = tl.minimum(begin + d_per_split, d)
    acc, squares = score_columns(
        x, weight, token, there, choice, choice < C, begin, end, x_stride, d, SQUARES, SPLIT,
        BLOCK_T, BLOCK_R, BLOCK_D,
    )  # fmt: skip
    planes += split.to(tl.int64) * split_stride
    store_scores(planes, acc, squares, token, there, choice, C, width, row_stride, SQUARES)


@triton.jit
def router_grad_kernel(
    dlogits, x, planes,
    num_tokens, tokens_per_split, C, d, dlogits_stride, x_stride, plane_stride,
    SPLIT: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """planes[split] = dlogits[tokens of the split]ᵀ x, [C, d] fp32.

    Grid (blocks of choices, tiles of d, splits of T).
    """
    split = tl.program_id(2)
    choice = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    real = choice < C
    column = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = column < d
    end = tl.minimum((split + 1) * tokens_per_split, num_tokens)
    acc = tl.zeros((BLOCK_R, BLOCK_D), dtype=tl.float32)
    for first in range(split * tokens_per_split, end, BLOCK_T):
        token = first + tl.arange(0, BLOCK_T)
        row = token.to(tl.int64)[:, None]
        there = (token < end)[:, None]
        x_tile = tl.load(
            x + row * x_stride + column[None, :], mask=there & inside[None, :], other=0.0
        )
        dl_tile = tl.load(
            dlogits + row * dlogits_stride + choice[None, :], mask=there & real[None, :], other=0.0
        )
        acc = multiply_exactly(tl.trans(dl_tile), x_tile, acc, SPLIT)
    place = split.to(tl.int64) * plane_stride + choice.to(tl.int64)[:, None] * d + column[None, :]
    tl.store(planes + place, acc, mask=real[:, None] & inside[None, :])


def splits_numbers(x: Tensor) -> bool:
    """Whether fp32 numbers are split into three for x, and not multiplied as they are."""
    return x.dtype == torch.bfloat16 and x.shape[0] > FEW_TOKENS


def router_tile(kernel: str, tokens: int, choices: int, split: bool) -> Tile:
    """The tile of a router's kernel; without a split of numbers the products are fp32's."""
    return tile_for(kernel, tokens, choices, torch.bfloat16 if split else torch.float32, "")


def router_planes(x: Tensor, weight: Tensor, width: int, squares: bool) -> Tensor:
    """The logits in fp32 planes [splits, T, width], to be summed in order; splits: a power of 2."""
    num_tokens, d = x.shape
    choices = weight.shape[0]
    split = splits_numbers(x)
    tile = router_tile("router", num_tokens, choices, split)
    grid = ceil_div(num_tokens, tile.BLOCK_T), ceil_div(width, tile.BLOCK_R)
    splits, part = power_splits(grid[0] * grid[1], d, tile.BLOCK_D, x.device)
    planes = weight.new_empty((splits, num_tokens, width))
    options = _options(tile, SQUARES=squares, SPLIT=split)
    if num_tokens:
        router_kernel[(*grid, splits)](
            x, weight, planes,
            num_tokens, d, part, choices, width, x.stride(0), planes.stride(0), planes.stride(1),
            **options,
        )  # fmt: skip
    return planes


def product(x: Tensor, weight: Tensor) -> Tensor:
    """x Wᵀ [T, C] fp32: one launch, and the sum of the planes."""
    planes = router_planes(_rows(x), weight.contiguous(), weight.shape[0], False)
    return planes[0] if planes.shape[0] == 1 else planes.sum(0)


def weight_grad(dlogits: Tensor, x: Tensor) -> Tensor:
    """dlogitsᵀ x [C, d] fp32: one launch, and the sum of the planes."""
    num_tokens, d = x.shape
    choices = dlogits.shape[1]
    if 0 in (num_tokens, d, choices):
        return dlogits.new_zeros((choices, d))
    dlogits = _rows(dlogits)
    x = _rows(x)
    split = splits_numbers(x)
    tile = router_tile("router_grad", num_tokens, choices, split)
    grid = ceil_div(choices, tile.BLOCK_R), ceil_div(d, tile.BLOCK_D)
    splits, part = split_count(grid[0] * grid[1], num_tokens, tile.BLOCK_T, x.device)
    planes = dlogits.new_empty((splits, choices, d))
    options = _options(tile, SPLIT=split)
    router_grad_kernel[(*grid, splits)](
        dlogits, x, planes,
        num_tokens, part, choices, d, dlogits.stride(0), x.stride(0), planes.stride(0),
        **options,
    )  # fmt: skip
    return planes[0] if splits == 1 else planes.sum(0)


def _options(tile: Tile, **flags: bool) -> dict[str, Any]:
    return {**flags, **launch_options(tile)}


def _rows(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def route(x: Tensor, router: TopK, num_slots: int) -> tuple[Tensor, Tensor, Tensor]:
    """(ids, weights, slot_experts) [T, K] of x [T, d], in two launches; slot_experts: ids with 0
    for -1, and empty where no choice is the null expert.
    """
    planes = router_planes(
        _rows(x), router.weight.contiguous(), logits_width(router), router.input_norm
    )
    return top_k(planes, router, num_slots)
