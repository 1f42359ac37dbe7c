"""Top-k routing inside a kernel: logits to experts and weights, while they are in registers."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def select_experts(
    logits, bias, token, there, ids, weights, stores,
    E, K: tl.constexpr, NORM: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """gate [tokens, BLOCK_E] fp32: the softmax of logits [tokens, BLOCK_E] at each token's K best
    experts, else 0.

    NORM: divided by its sum over them. bias [E] or None shifts which are chosen, not their weights;
    of equals the first is chosen. Where `stores`, ids and weights [T, K] are written, best first.
    """
    lane = tl.arange(0, BLOCK_E)
    real = (lane < E)[None, :]
    logits = tl.where(real, logits, float("-inf"))
    powers = tl.exp(logits - tl.max(logits, axis=1)[:, None])
    probabilities = powers / tl.sum(powers, axis=1)[:, None]
    scores = logits
    if bias is not None:
        shifted = probabilities + tl.load(bias + lane, mask=lane < E, other=0.0)[None, :]
        scores = tl.where(real, shifted, float("-inf"))
    order = tl.full(logits.shape, K, tl.int32)
    for slot in tl.static_range(K):
        best = tl.max(scores, axis=1)
        # A NaN equals nothing: it chooses the last expert, and its weight stays NaN.
        first = tl.min(tl.where(scores == best[:, None], lane[None, :], E - 1), axis=1)
        hit = lane[None, :] == first[:, None]
        order = tl.where(hit, slot, order)
        scores = tl.where(hit, float("-inf"), scores)
    gate = tl.where(order < K, probabilities, 0.0)
    if NORM:
        gate = gate / tl.sum(gate, axis=1)[:, None]
    if stores:
        for slot in tl.static_range(K):
            place = token.to(tl.int64) * K + slot
            expert = tl.sum(tl.where(order == slot, lane[None, :], 0), axis=1)
            tl.store(ids + place, expert.to(tl.int64), mask=there)
            tl.store(
                weights + place, tl.sum(tl.where(order == slot, gate, 0.0), axis=1), mask=there
            )
    return gate


@triton.jit
def gate_in_rank_space(
    gate, experts, scaling, total_rank, BLOCK_E: tl.constexpr, BLOCK_R: tl.constexpr
):
    """g·s [tokens, BLOCK_R] of gate [tokens, BLOCK_E]: each rank takes its expert's, by a product
    with ones.
    """
    rank = tl.arange(0, BLOCK_R)
    expert = tl.load(experts + rank, mask=rank < total_rank, other=-1)
    scale = tl.load(scaling + tl.maximum(expert, 0))
    ones = (tl.arange(0, BLOCK_E)[:, None] == expert[None, :]).to(tl.float32)
    return tl.dot(gate, ones, input_precision="ieee") * scale[None, :]


@triton.jit
def gate_of_ranks(weights, row_ids, row, there, expert, scale, K: tl.constexpr):
    """g·s [tokens, ranks] fp32 of the dense path: Σ_k w[row, k] · [ids[row, k] = expert] · s."""
    gate = tl.zeros((row.shape[0], expert.shape[0]), dtype=tl.float32)
    for slot in tl.static_range(K):
        chosen = tl.load(row_ids + row * K + slot, mask=there, other=-1).to(tl.int32)
        weight = tl.load(weights + row * K + slot, mask=there, other=0.0)
        gate += tl.where(chosen[:, None] == expert[None, :], weight[:, None], 0.0)
    return gate * scale[None, :]
