"""Top-k routing inside a kernel: logits to experts and weights, while they are in registers."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..plan import TopK
from .tiles import ceil_div, launch_options, tile_for

# What stands before h in the planes is a multiple of this: a block of the router's in the shrink,
# and vectors of 16 bytes fit.
ALIGNED = 16


@triton.jit
def select_experts(
    logits, bias, token, there, ids, weights, slot_experts, stores,
    E, C, K: tl.constexpr, NORM: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """gate [tokens, BLOCK_E] fp32: the softmax of logits [tokens, C of BLOCK_E] at each token's K
    best choices, else 0; choices from E on are no experts.

    NORM: divided by its sum over them. bias [C] or None shifts which are chosen, not their weights;
    of equals the first is chosen. Where `stores`, ids and weights [T, K] are written, best first:
    -1 and 0 for what is no expert; and slot_experts, which has 0 there, unless it is None.
    """
    lane = tl.arange(0, BLOCK_E)
    real = (lane < C)[None, :]
    logits = tl.where(real, logits, float("-inf"))
    powers = tl.exp(logits - tl.max(logits, axis=1)[:, None])
    probabilities = powers / tl.sum(powers, axis=1)[:, None]
    scores = logits
    if bias is not None:
        shifted = probabilities + tl.load(bias + lane, mask=lane < C, other=0.0)[None, :]
        scores = tl.where(real, shifted, float("-inf"))
    order = tl.full(logits.shape, K, tl.int32)
    for slot in tl.static_range(K):
        best = tl.max(scores, axis=1)
        first = tl.min(tl.where(scores == best[:, None], lane[None, :], C), axis=1)
        # A NaN equals nothing: it chooses the last expert, and its weight stays NaN.
        first = tl.where(first < C, first, E - 1)
        hit = lane[None, :] == first[:, None]
        order = tl.where(hit, slot, order)
        scores = tl.where(hit, float("-inf"), scores)
    gate = tl.where(order < K, probabilities, 0.0)
    if NORM:
        gate = gate / tl.sum(gate, axis=1)[:, None]
    if stores:
        for slot in tl.static_range(K):
            place = token.to(tl.int64) * K + slot
            chosen = tl.sum(tl.where(order == slot, lane[None, :], 0), axis=1)
            weight = tl.sum(tl.where(order == slot, gate, 0.0), axis=1)
            tl.store(ids + place, tl.where(chosen < E, chosen, -1).to(tl.int64), mask=there)
            tl.store(weights + place, tl.where(chosen < E, weight, 0.0), mask=there)
            if slot_experts is not None:
                expert = tl.where(chosen < E, chosen, 0)
                tl.store(slot_experts + place, expert.to(tl.int64), mask=there)
    return gate


@triton.jit
def gate_in_rank_space(gate, expert, scale):
    """g·s [tokens, ranks] of gate [tokens, choices]: each rank takes its expert's."""
    index = tl.maximum(expert, 0)[None, :].broadcast_to(gate.shape[0], expert.shape[0])
    return tl.gather(gate, index, axis=1) * scale[None, :]


@triton.jit
def gate_of_ranks(weights, row_ids, row, there, expert, scale, K: tl.constexpr):
    """g·s [tokens, ranks] fp32 of the dense path: Σ_k w[row, k] · [ids[row, k] = expert] · s."""
    gate = tl.zeros((row.shape[0], expert.shape[0]), dtype=tl.float32)
    for slot in tl.static_range(K):
        chosen = tl.load(row_ids + row * K + slot, mask=there, other=-1).to(tl.int32)
        weight = tl.load(weights + row * K + slot, mask=there, other=0.0)
        gate += tl.where(chosen[:, None] == expert[None, :], weight[:, None], 0.0)
    return gate * scale[None, :]


@triton.jit
def load_planes(planes, token, column, mask, split_stride, row_stride, SPLITS: tl.constexpr):
    """The planes [SPLITS, tokens, columns] in one load; `tl.sum` over axis 0 adds them, always in
    the same order.
    """
    split = tl.arange(0, SPLITS).to(tl.int64)[:, None, None] * split_stride
    row = token.to(tl.int64)[None, :, None] * row_stride
    return tl.load(planes + split + row + column[None, None, :], mask=mask[None, :, :], other=0.0)


@triton.jit
def inverse_norm(squares, d):
    """1 / √mean(x²) of a token's sum of squares, as a router's input_norm has it."""
    return tl.rsqrt(squares / d + 1.1754943508222875e-38)


@triton.jit
def top_k_kernel(
    planes, bias, ids, weights, slot_experts, d, E, C, split_stride, row_stride,
    INPUT_NORM: tl.constexpr, SPLITS: tl.constexpr, K: tl.constexpr, NORM: tl.constexpr,
    BLOCK_R: tl.constexpr,
):  # fmt: skip
    """ids, weights [T, K] of the logits' planes [SPLITS, T, C …]. Grid (tokens).

    slot_experts [T, K]: ids with 0 for -1, or None where every choice is an expert.
    """
    token = tl.program_id(0) + tl.arange(0, 1)
    there = token >= 0
    lane = tl.arange(0, BLOCK_R)
    parts = load_planes(
        planes, token, lane, (lane < C)[None, :], split_stride, row_stride, SPLITS
    )  # fmt: skip
    logits = tl.sum(parts, axis=0)
    if INPUT_NORM:
        last = tl.arange(0, 1)
        squares = load_planes(
            planes, token, last + C, (last >= 0)[None, :], split_stride, row_stride, SPLITS
        )  # fmt: skip
        logits = logits * inverse_norm(tl.sum(squares, axis=0), d)
    select_experts(
        logits, bias, token, there, ids, weights, slot_experts, True, E, C, K, NORM, BLOCK_R
    )  # fmt: skip


def top_k(planes: Tensor, router: TopK, num_slots: int) -> tuple[Tensor, Tensor, Tensor]:
    """`router.route` of the logits' planes [splits, T, …], in one launch."""
    splits, num_tokens, _ = planes.shape
    choices, d = router.weight.shape
    ids = planes.new_empty((num_tokens, num_slots), dtype=torch.int64)
    weights = planes.new_empty((num_tokens, num_slots))
    slot_experts = torch.empty_like(ids) if router.null_expert else None
    if num_tokens:
        tile = tile_for("top_k", num_tokens, choices, torch.float32, "")
        options = launch_options(tile)
        del options["BLOCK_T"], options["BLOCK_D"]
        top_k_kernel[(num_tokens,)](
            planes, router.selection_bias, ids, weights, slot_experts,
            d, router.num_experts, choices, *planes.stride()[:2],
            INPUT_NORM=router.input_norm, SPLITS=splits, K=num_slots, NORM=router.norm, **options,
        )  # fmt: skip
    return ids, weights, ids.new_empty(0) if slot_experts is None else slot_experts


def logits_width(router: TopK) -> int:
    """How many columns the logits, and where they need it the sum of x's squares, take up."""
    columns = router.weight.shape[0] + int(router.input_norm)
    return ceil_div(columns, ALIGNED) * ALIGNED
