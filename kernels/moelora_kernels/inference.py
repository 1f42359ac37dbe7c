"""Without gradients and with equal ranks: the dense and the one-token sequence path in the fewest operations.

While generating, a layer's products are so small that each call from Python costs as much as they do. What all
linears under one router need alike is made once and kept on the plan.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .plan import Plan
from .rank_rows import uniform_rank

Offsets = tuple[int, ...]


def applies(site: tuple[Offsets, ...], plan: Plan) -> bool:
    """Whether the two functions below do what the general ones do, for this site and plan."""
    if plan.path == "grouped" or plan.num_tokens == 0 or (plan.path == "sequence" and plan.tokens_per_row != 1):
        return False
    return bool(uniform_rank(site[0])) and all(offsets == site[0] for offsets in site[1:])


def shrink(x: Tensor, lora_A: Tensor, site: tuple[Offsets, ...], plan: Plan) -> tuple[Tensor, ...]:
    """h_l = x A_lᵀ for every linear l, x [T, d_in]; the same forms as `eager.shrink`."""
    total = site[0][-1]
    if plan.path == "dense":
        h = torch.mm(x, lora_A.to(x.dtype).T)
        return (h,) if len(site) == 1 else h.split(total, dim=1)
    rank = total // plan.num_experts
    slots, rows = plan.num_slots, plan.rows
    blocks = lora_A.reshape(-1, rank * x.shape[1]).index_select(0, _blocks(plan, len(site)))
    chosen = blocks.view(rows, len(site) * slots * rank, x.shape[1]).to(x.dtype)
    h = torch.bmm(chosen, x.unsqueeze(2))
    return h.view(rows, len(site), 1, slots, rank).unbind(1)


def expand(
    h: Tensor,
    lora_B: Tensor,
    scaling: tuple[float, ...],
    plan: Plan,
    out: Tensor | None,
    inplace: bool,
) -> Tensor:
    """y = out + Σ_e w_e · s_e · h_e B_e for one linear; the same as `eager.expand`."""
    dtype = h.dtype if out is None else out.dtype
    width = lora_B.shape[1]
    rank = lora_B.shape[0] // plan.num_experts
    gated = (h.reshape(plan.num_tokens, -1) * _gate(plan, rank, scaling)).to(dtype)
    if out is None:
        out, inplace = gated.new_zeros(plan.num_tokens, width), True
    flat = out.view(plan.num_tokens, width) if inplace else out.reshape(plan.num_tokens, width).clone()
    if plan.path == "dense":
        flat.addmm_(gated, lora_B.to(dtype))
    else:
        blocks = lora_B.reshape(-1, rank * width).index_select(0, _blocks(plan, 1)).to(dtype)
        if plan.rows == 1:
            flat.addmm_(gated, blocks.view(-1, width))
        else:
            chosen = blocks.view(plan.rows, -1, width)
            flat.unsqueeze(1).baddbmm_(gated.unsqueeze(1), chosen)
    return out if inplace else flat.view(out.shape)


def _gate(plan: Plan, rank: int, scaling: tuple[float, ...]) -> Tensor:
    """w_e · s_e for each column of h: dense [T, R], sequence [T, K·rank]; kept on the plan."""
    key = ("gate", rank, scaling)
    gate = plan.memo.get(key)
    if gate is None:
        weights = plan.weights
        if scaling.count(scaling[0]) == len(scaling):
            weights = weights * scaling[0]
        else:
            scale = weights.new_tensor(scaling)
            weights = weights * (scale if plan.path == "dense" else scale[plan.slot_experts])
        gate = weights.unsqueeze(2).expand(-1, -1, rank).reshape(plan.rows, -1)
        if plan.tokens_per_row != 1:
            gate = gate.repeat_interleave(plan.tokens_per_row, dim=0)
        plan.memo[key] = gate
    return gate


def _blocks(plan: Plan, linears: int) -> Tensor:
    """Which blocks of rows of a factor the rows chose, for each linear and slot: [rows · L · K]; kept on the plan."""
    key = ("blocks", linears)
    blocks = plan.memo.get(key)
    if blocks is None:
        blocks = plan.slot_experts
        if linears > 1:
            firsts = torch.arange(0, linears * plan.num_experts, plan.num_experts, device=blocks.device)
            blocks = blocks.unsqueeze(1) + firsts.unsqueeze(1)
        blocks = plan.memo[key] = blocks.reshape(-1)
    return blocks
