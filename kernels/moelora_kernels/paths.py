"""The products of each path: x Fᵀ, h F and hᵀ x for the stacked factors F of a site's linears.

Shrink is `down` and expand is `up`; the backward pass of each is the other one and `outer`.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from .dispatch import MASKED
from .layout import Layout
from .plan import Plan
from .rank_rows import equal_bags, rank_bags, slot_rows, token_rows


class Dense:
    """h [T, R]: all experts in one product, those not chosen with gate 0; weights [rows, E]."""

    @staticmethod
    def scale(weights: Tensor, layout: Layout, plan: Plan) -> Tensor | float:
        """s_e in a form that multiplies weights."""
        return _scale(weights, layout)

    @staticmethod
    def weighted(h: Tensor, weights: Tensor, layout: Layout, plan: Plan) -> Tensor:
        """h with each rank times the weight of its expert, [T, R]."""
        rank = layout.uniform[0]
        if rank is None:
            weights = weights.index_select(1, layout.experts)
            if plan.tokens_per_row != 1:
                weights = weights.repeat_interleave(plan.tokens_per_row, dim=0)
            return h * weights
        blocks = h.view(plan.rows, plan.tokens_per_row, plan.num_experts, rank)
        return (blocks * weights[:, None, :, None]).view(h.shape)

    @staticmethod
    def collect(terms: Tensor, layout: Layout, plan: Plan) -> Tensor:
        """Sums of terms [T, R] over the ranks of an expert and the tokens of a row: [rows, E]."""
        if plan.tokens_per_row != 1:
            terms = terms.view(plan.rows, plan.tokens_per_row, terms.shape[1]).sum(1)
        rank = layout.uniform[0]
        if rank is not None:
            return terms.view(plan.rows, plan.num_experts, rank).sum(2)
        parts = terms.split(layout.expert_ranks[0], dim=1)
        return torch.stack([part.sum(1) for part in parts], dim=1)

    @staticmethod
    def down(x: Tensor, factor: Tensor, layout: Layout, plan: Plan) -> tuple[Tensor, ...]:
        """h_l = x F_lᵀ [T, R_l]."""
        h = torch.mm(x, factor.T)
        return h.split(layout.totals, dim=1)

    @staticmethod
    def up(
        hs: tuple[Tensor, ...],
        factor: Tensor,
        layout: Layout,
        plan: Plan,
        out: Tensor | None = None,
        inplace: bool = False,
    ) -> Tensor:
        """out + Σ_l h_l F_l [T, d]."""
        h = _join(hs)
        if out is None:
            return torch.mm(h, factor)
        return out.addmm_(h, factor) if inplace else torch.addmm(out, h, factor)

    @staticmethod
    def outer(hs: tuple[Tensor, ...], x: Tensor, layout: Layout, plan: Plan) -> Tensor:
        """h_lᵀ x, stacked [Σ_l R_l, d]."""
        return torch.mm(_join(hs).T, x)


class Slots:
    """h [rows, tokens_per_row, K, max rank], 0 where smaller ranks pad; weights [rows, K]."""

    @staticmethod
    def scale(weights: Tensor, layout: Layout, plan: Plan) -> Tensor | float:
        """s_e in a form that multiplies weights."""
        scale = _scale(weights, layout)
        return scale[plan.slot_experts] if isinstance(scale, Tensor) else scale

    @staticmethod
    def weighted(h: Tensor, weights: Tensor, layout: Layout, plan: Plan) -> Tensor:
        """h with each slot times its weight."""
        return h * weights[:, None, :, None]

    @staticmethod
    def collect(terms: Tensor, layout: Layout, plan: Plan) -> Tensor:
        """Sums of terms over ranks and the tokens of a row: [rows, K]."""
        return terms.sum((1, 3))


class Grouped(Slots):
    """A token is a bag of K·r weighted rows of F, and a row of F a bag of weighted tokens.

    Embedding bags add a bag's rows in registers and in a fixed order: the time does not grow with
    E, nothing but the result is written, and there are no atomics.
    """

    @staticmethod
    def down(x: Tensor, factor: Tensor, layout: Layout, plan: Plan) -> tuple[Tensor, ...]:
        """h_l[t, k, j] = ⟨x[t], F_l[row j of the slot's expert]⟩."""
        index, padding = token_rows(layout, plan)
        if index.numel() == 0:
            return _split(x.new_zeros(index.shape), layout, plan)
        bags = equal_bags(index, len(index))
        h = products_of_bags(x, factor, index.view(-1), *bags).view(index.shape)
        return _split(h if padding is None else h.masked_fill(padding, 0.0), layout, plan)

    @staticmethod
    def up(
        hs: tuple[Tensor, ...],
        factor: Tensor,
        layout: Layout,
        plan: Plan,
        out: Tensor | None = None,
        inplace: bool = False,
    ) -> Tensor:
        """out[t] + Σ_{l,k,j} h_l[t, k, j] F_l[row j of the slot's expert]."""
        index, _ = token_rows(layout, plan)
        if index.numel() == 0:
            added = factor.new_zeros(plan.num_tokens, factor.shape[1])
        else:
            weights = _join([h.reshape(plan.num_tokens, -1) for h in hs])
            added = embedding_bag(index, factor, mode="sum", per_sample_weights=weights)
        if out is None:
            return added
        return out.add_(added) if inplace else added.add_(out)

    @staticmethod
    def outer(hs: tuple[Tensor, ...], x: Tensor, layout: Layout, plan: Plan) -> Tensor:
        """Σ_{slots of expert e} h_l[t, k, j] x[t] for each row j of each expert, [Σ_l R_l, d]."""
        tokens, weights, firsts = rank_bags(hs, layout, plan)
        if tokens.numel() == 0 or x.numel() == 0:
            return x.new_zeros(len(firsts), x.shape[1])
        x = x.contiguous()
        return embedding_bag(tokens, x, firsts, mode="sum", per_sample_weights=weights)


class Sequence(Slots):
    """Each row gathers its experts' factors, for batched products over its tokens."""

    @staticmethod
    def down(x: Tensor, factor: Tensor, layout: Layout, plan: Plan) -> tuple[Tensor, ...]:
        """h_l = x F_lᵀ of each row's experts."""
        chosen, padding = _gather(factor, layout, plan)
        h = torch.bmm(_rows(x, plan), chosen.mT)
        return _split(h if padding is None else h.masked_fill(padding[:, None], 0.0), layout, plan)

    @staticmethod
    def up(
        hs: tuple[Tensor, ...],
        factor: Tensor,
        layout: Layout,
        plan: Plan,
        out: Tensor | None = None,
        inplace: bool = False,
    ) -> Tensor:
        """out + Σ_l h_l F_l of each row's experts."""
        chosen, _ = _gather(factor, layout, plan)
        h = _join([h.flatten(2) for h in hs])
        if out is None:
            return torch.bmm(h, chosen).flatten(0, 1)
        if inplace:
            _rows(out, plan).baddbmm_(h, chosen)
            return out
        return torch.baddbmm(_rows(out, plan), h, chosen).flatten(0, 1)

    @staticmethod
    def outer(hs: tuple[Tensor, ...], x: Tensor, layout: Layout, plan: Plan) -> Tensor:
        """h_lᵀ x of each row, added by expert in a product with one-hot ids: no atomics."""
        experts = torch.arange(plan.num_experts, device=x.device)
        one_hot = (experts[:, None] == plan.slot_experts.view(-1)).to(x.dtype)
        parts = []
        for linear, h in enumerate(hs):
            rank = h.shape[3]
            width = x.shape[1]
            products = torch.bmm(h.flatten(2).mT, _rows(x, plan))
            blocks = one_hot @ products.view(one_hot.shape[1], rank * width)
            blocks = blocks.view(plan.num_experts, rank, width)
            if layout.uniform[linear] is not None:
                parts.append(blocks.flatten(0, 1))
            else:
                own = zip(blocks, layout.expert_ranks[linear], strict=True)
                parts += [block[:r] for block, r in own]
        return parts[0] if len(parts) == 1 else torch.cat(parts)


PRODUCTS = {"dense": Dense, "matmul": Dense, "grouped": Grouped, "sequence": Sequence}


def products_of_bags(
    x: Tensor, factor: Tensor, index: Tensor, firsts: Tensor, bags: Tensor
) -> Tensor:
    """⟨x[bag], F[row]⟩ for each row of each bag: as index, which `equal_bags` divides."""
    # This is the gradient of a bag's weights: y = Σ w F[index] gives dw = ⟨dy, F[index]⟩.
    return torch.ops.aten._embedding_bag_per_sample_weights_backward(
        x.contiguous(), factor.contiguous(), index, firsts, bags, 0
    )


def path_weights(plan: Plan) -> Tensor:
    """The weights in the form of the path: of all experts [rows, E], else [rows, K]."""
    return plan.gate if plan.path in MASKED else plan.weights


def _scale(weights: Tensor, layout: Layout) -> Tensor | float:
    """A float where all experts scale alike, else a tensor [E] of the dtype of the weights."""
    if layout.scale is not None:
        return layout.scale
    if weights.dtype == torch.float32:
        return layout.scales
    return weights.new_tensor(layout.scaling)


def _join(hs: list[Tensor] | tuple[Tensor, ...]) -> Tensor:
    return hs[0] if len(hs) == 1 else torch.cat(list(hs), dim=-1)


def _split(h: Tensor, layout: Layout, plan: Plan) -> tuple[Tensor, ...]:
    """h of all linears [..., Σ_l K·max rank_l] as one [rows, tokens_per_row, K, max rank] each."""
    shape = (plan.rows, plan.tokens_per_row, plan.num_slots)
    if layout.num_linears == 1:
        return (h.view(*shape, layout.max_rank),)
    parts = h.split_with_sizes([plan.num_slots * width for width in layout.widths], dim=-1)
    return tuple(part.view(*shape, w) for part, w in zip(parts, layout.widths, strict=True))


def _rows(x: Tensor, plan: Plan) -> Tensor:
    return x.view(plan.rows, plan.tokens_per_row, x.shape[1])


def _gather(factor: Tensor, layout: Layout, plan: Plan) -> tuple[Tensor, Tensor | None]:
    """The rows of F for each routing row, [rows, Σ_l K·max rank_l, d], and where they pad."""
    width = factor.shape[1]
    needed = plan.num_slots * sum(layout.widths)
    if not (layout.alike and width):
        index, padding = slot_rows(layout, plan)
        return factor.index_select(0, index.view(-1)).view(plan.rows, needed, width), padding
    blocks = plan.slot_experts  # equal ranks: one index for each block of rows
    if layout.num_linears > 1:
        count = layout.num_linears * plan.num_experts
        linears = torch.arange(0, count, plan.num_experts, device=blocks.device)
        blocks = blocks[:, None] + linears[:, None]
    chosen = factor.reshape(-1, layout.alike * width).index_select(0, blocks.view(-1))
    return chosen.view(plan.rows, needed, width), None
