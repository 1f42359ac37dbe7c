"""Without gradients and with equal ranks: the sequence path of single tokens in the fewest
operations.

While generating, a layer's products are so small that each call from Python costs as much as they
do. What all linears under one router need alike is made once and kept on the plan. One token's
experts are gathered; several tokens are bags of their experts' rows, which are read where they lie.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear

from .layout import Layout
from .paths import Sequence, products_of_bags
from .plan import Plan
from .rank_rows import equal_bags


def applies(layout: Layout, plan: Plan) -> bool:
    """Whether the two functions below do what the general ones do, for this site and plan."""
    one_token = plan.path == "sequence" and plan.tokens_per_row == 1
    return one_token and layout.blocks is not None and plan.rows > 0 and plan.num_slots > 0


def shrink(x: Tensor, lora_A: Tensor, layout: Layout, plan: Plan) -> tuple[Tensor, ...]:
    """h_l = x A_lᵀ for every linear l, x [T, d_in]: [T, 1, K, rank], as `eager.shrink`."""
    linears = layout.num_linears
    if plan.rows == 1:
        h = linear(x, _gathered(lora_A, x.dtype, layout, plan))
    else:
        h = products_of_bags(x, lora_A.to(x.dtype), *_bags(layout, plan))
    if linears == 1:
        return (h.view(plan.rows, 1, -1, layout.max_rank),)
    return h.view(plan.rows, 1, -1, linears, layout.max_rank).unbind(3)


def expand(
    h: Tensor, lora_B: Tensor, layout: Layout, plan: Plan, out: Tensor | None, inplace: bool
) -> Tensor:
    """y = out + Σ_e w_e · s_e · h_e B_e for one linear; the same as `eager.expand`."""
    dtype = h.dtype if out is None else out.dtype
    gated = h * _gate(layout, plan)
    if gated.dtype != dtype:
        gated = gated.to(dtype)
    if plan.rows == 1:
        blocks = _gathered(lora_B, dtype, layout, plan)
        gated = gated.view(1, -1)
        if out is None:
            return gated.mm(blocks)
        flat = out.view(1, -1) if inplace else out.reshape(1, -1).clone()
        flat.addmm_(gated, blocks)
        return out if inplace else flat.view(out.shape)
    index, firsts, _ = _bags(layout, plan)
    y = torch.embedding_bag(lora_B.to(dtype), index, firsts, False, 0, False, gated.view(-1))[0]
    if out is None:
        return y
    y = y.view(out.shape)
    return out.add_(y) if inplace else y.add_(out)


def _gate(layout: Layout, plan: Plan) -> Tensor:
    """w_e · s_e [T, 1, K, 1]; kept on the plan."""
    key = layout.scale or layout.scaling
    gate = plan.memo.get(key)
    if gate is None:
        gate = plan.weights * Sequence.scale(plan.weights, layout, plan)
        plan.memo[key] = gate = gate.view(plan.rows, 1, -1, 1)
    return gate


def _gathered(factor: Tensor, dtype: torch.dtype, layout: Layout, plan: Plan) -> Tensor:
    """The rows of one token's experts in dtype, [K · L · rank, d]: slot after slot in each all
    linears. A kept plan gathers them once, and again where the factor has changed.
    """
    if not plan.kept or factor.is_inference():
        return _gather(factor, dtype, layout, plan)
    source, version, rows = plan.memo.get(layout, (None, 0, None))
    if source is not factor or version != factor._version or rows.dtype != dtype:
        rows = _gather(factor, dtype, layout, plan)
        plan.memo[layout] = (factor, factor._version, rows)
    return rows


def _gather(factor: Tensor, dtype: torch.dtype, layout: Layout, plan: Plan) -> Tensor:
    width = factor.shape[1]
    linears = layout.num_linears
    blocks = plan.slot_experts
    if linears > 1:
        assert layout.firsts is not None
        blocks = layout.firsts.index_select(0, blocks.view(-1))
    chosen = factor.reshape(-1, layout.max_rank * width).index_select(0, blocks.view(-1))
    return chosen.view(-1, width).to(dtype)


def _bags(layout: Layout, plan: Plan) -> tuple[Tensor, Tensor, Tensor]:
    """The rows of each token's experts in all linears [T · K · L · rank], where each token's begin
    [T], and the token of each row; kept on the plan.
    """
    key = (layout.num_linears, layout.max_rank)
    bags = plan.memo.get(key)
    if bags is None:
        assert layout.blocks is not None
        index = layout.blocks.index_select(0, plan.slot_experts.reshape(-1)).view(-1)
        plan.memo[key] = bags = (index, *equal_bags(index, plan.rows))
    return bags
