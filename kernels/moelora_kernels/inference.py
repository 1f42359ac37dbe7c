"""Without gradients and with equal ranks: the dense and the one-token sequence path in the fewest
operations.

While generating, a layer's products are so small that each call from Python costs as much as they
do. What all linears under one router need alike is made once and kept on the plan.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear

from .layout import Layout
from .paths import PRODUCTS, path_weights
from .plan import Plan


def applies(layout: Layout, plan: Plan) -> bool:
    """Whether the two functions below do what the general ones do, for this site and plan."""
    if layout.alike is None or plan.path == "grouped" or plan.num_tokens == 0:
        return False
    return plan.path != "sequence" or plan.tokens_per_row == 1


def shrink(x: Tensor, lora_A: Tensor, layout: Layout, plan: Plan) -> tuple[Tensor, ...]:
    """h_l = x A_lᵀ for every linear l, x [T, d_in]; the same forms as `eager.shrink`."""
    if lora_A.dtype != x.dtype:
        lora_A = lora_A.to(x.dtype)
    linears = layout.num_linears
    if plan.path != "sequence":
        h = linear(x, lora_A)
        return (h,) if linears == 1 else h.split(layout.totals[0], dim=1)
    rank = layout.max_rank
    slots = plan.num_slots
    rows = plan.rows
    blocks = lora_A.reshape(-1, rank * x.shape[1]).index_select(0, _blocks(plan, linears))
    if rows == 1:
        h = linear(x, blocks.view(-1, x.shape[1]))
    else:
        h = torch.bmm(blocks.view(rows, -1, x.shape[1]), x.unsqueeze(2))
    if linears == 1:
        return (h.view(rows, 1, slots, rank),)
    return h.view(rows, linears, 1, slots, rank).unbind(1)


def expand(
    h: Tensor, lora_B: Tensor, layout: Layout, plan: Plan, out: Tensor | None, inplace: bool
) -> Tensor:
    """y = out + Σ_e w_e · s_e · h_e B_e for one linear; the same as `eager.expand`."""
    dtype = h.dtype if out is None else out.dtype
    width = lora_B.shape[1]
    rank = layout.max_rank
    tokens = plan.num_tokens
    gate = _gate(plan, layout)
    gated = (h if h.dim() == 4 else h.view(plan.rows, -1, plan.num_experts, rank)) * gate
    if gated.dtype != dtype:
        gated = gated.to(dtype)
    if lora_B.dtype != dtype:
        lora_B = lora_B.to(dtype)
    if out is None:
        out = gated.new_zeros(tokens, width)
        inplace = True
    flat = out.view(tokens, width) if inplace else out.reshape(tokens, width).clone()
    if plan.path != "sequence":
        flat.addmm_(gated.view(tokens, -1), lora_B)
    else:
        blocks = lora_B.reshape(-1, rank * width).index_select(0, _blocks(plan, 1))
        if tokens == 1:
            flat.addmm_(gated.view(1, -1), blocks.view(-1, width))
        else:
            flat.unsqueeze(1).baddbmm_(gated.view(tokens, 1, -1), blocks.view(tokens, -1, width))
    return out if inplace else flat.view(out.shape)


def _gate(plan: Plan, layout: Layout) -> Tensor:
    """w_e · s_e: dense [rows, 1, E, 1] for h as [rows, tokens, E, rank], sequence [T, 1, K, 1];
    kept on the plan.
    """
    key = ("gate", layout.scaling if layout.scale is None else layout.scale)
    gate = plan.memo.get(key)
    if gate is None:
        weights = path_weights(plan)
        scale = PRODUCTS[plan.path].scale(weights, layout, plan)
        gate = (weights * scale).view(plan.rows, 1, -1, 1)
        plan.memo[key] = gate
    return gate


def _blocks(plan: Plan, linears: int) -> Tensor:
    """Which blocks of rows of a factor the rows chose, for each linear and slot: [rows · L · K];
    kept on the plan.
    """
    key = ("blocks", linears)
    blocks = plan.memo.get(key)
    if blocks is None:
        blocks = plan.slot_experts
        if linears > 1:
            firsts = torch.arange(
                0, linears * plan.num_experts, plan.num_experts, device=blocks.device
            )
            blocks = blocks.unsqueeze(1) + firsts.unsqueeze(1)
        blocks = blocks.view(-1)
        plan.memo[key] = blocks
    return blocks
