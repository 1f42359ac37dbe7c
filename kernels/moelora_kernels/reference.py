"""The specification: loops over experts and slots, for any dtype and device, plain autograd."""

from __future__ import annotations

import torch
from einops import repeat
from torch import Tensor

from .layout import Layout
from .plan import Plan


def lora_mixture(
    x: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    expert_ids: Tensor,
    expert_weights: Tensor,
    rank_offsets: tuple[int, ...],
    scaling: tuple[float, ...],
    out: Tensor | None = None,
    *,
    tokens_per_row: int = 1,
) -> Tensor:
    """y[t] = out[t] + Σ_k w[t, k] · s_e · (x[t] A_eᵀ) B_e with e = expert_ids[t, k].

    x [T, d_in], lora_A [R, d_in], lora_B [R, d_out], expert_ids and expert_weights [rows, K],
    out [T, d_out] or None (= 0); token t is in row t // tokens_per_row.
    """
    y = x.new_zeros(len(x), lora_B.shape[1]) if out is None else out
    ids = repeat(expert_ids, "rows K -> (rows tokens) K", tokens=tokens_per_row)
    weights = repeat(expert_weights, "rows K -> (rows tokens) K", tokens=tokens_per_row)
    for slot in range(ids.shape[1]):
        for expert, scale in enumerate(scaling):
            rows = slice(rank_offsets[expert], rank_offsets[expert + 1])
            tokens = (ids[:, slot] == expert).nonzero().squeeze(1)
            hidden = x[tokens] @ lora_A[rows].to(x.dtype).T
            gated = (hidden * weights[tokens, slot, None] * scale).to(y.dtype)
            y = y.index_add(0, tokens, gated @ lora_B[rows].to(y.dtype))
    return y


def top_k(
    x: Tensor,
    router: Tensor,
    num_slots: int,
    bias: Tensor | None = None,
    norm: bool = True,
    null_expert: bool = False,
    input_norm: bool = False,
) -> tuple[Tensor, Tensor]:
    """(expert_ids, weights) [T, K]: the softmax of x Wᵀ, its K largest after adding bias; norm
    divides by their sum. null_expert: the last choice is no expert, -1 with weight 0. input_norm:
    of x / √mean(x²).

    x [T, d], router [C, d], bias [C].
    """
    x = x.to(router.dtype)
    if input_norm:
        x = x / x.square().mean(1, keepdim=True).sqrt()
    probabilities = (x @ router.T).softmax(-1)
    ids = (probabilities if bias is None else probabilities + bias).topk(num_slots).indices
    weights = probabilities.gather(1, ids)
    weights = weights / weights.sum(1, keepdim=True) if norm else weights
    if not null_expert:
        return ids, weights
    empty = ids == len(router) - 1
    return ids.masked_fill(empty, -1), weights.masked_fill(empty, 0.0)


def shrink(x: Tensor, lora_A: Tensor, layout: Layout, plan: Plan) -> tuple[Tensor, ...]:
    """h_l = x A_lᵀ [T, R_l] of every linear l of the site, for all experts on every path."""
    hidden = []
    first = 0
    for offsets in layout.rank_offsets:
        hidden.append(x @ lora_A[first : first + offsets[-1]].to(x.dtype).T)
        first += offsets[-1]
    return tuple(hidden)


def expand(
    h: Tensor,
    lora_B: Tensor,
    layout: Layout,
    plan: Plan,
    out: Tensor | None = None,
    *,
    inplace: bool = False,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """y = out + Σ_e gate[:, e] · s_e · h_e B_e; h [T, R], lora_B [R, d_out], never in place."""
    dtype = (dtype or h.dtype) if out is None else out.dtype
    gate = _gate(plan)
    shape = (len(h), lora_B.shape[1])
    y = h.new_zeros(shape, dtype=dtype) if out is None else out.reshape(shape)
    (offsets,) = layout.rank_offsets
    for expert, scale in enumerate(layout.scaling or ()):
        rows = slice(offsets[expert], offsets[expert + 1])
        gated = (h[:, rows] * gate[:, expert, None] * scale).to(dtype)
        y = y + gated @ lora_B[rows].to(dtype)
    return y if out is None else y.reshape(out.shape)


def _gate(plan: Plan) -> Tensor:
    """gate [T, E]: the weight of each expert for each token, from the plan of any path."""
    gate = plan.weights.new_zeros(plan.rows, plan.num_experts)
    gate = gate.scatter_add(1, plan.expert_ids.clamp(min=0), plan.weights)
    return repeat(gate, "rows E -> (rows tokens) E", tokens=plan.tokens_per_row)
