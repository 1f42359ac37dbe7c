"""Which rows of a stacked factor each slot and token needs, and which tokens each row."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from .layout import Layout
from .plan import Plan


def slot_rows(layout: Layout, plan: Plan) -> tuple[Tensor, Tensor | None]:
    """Which rows of F each routing row needs, [rows, Σ_l K·max rank_l], and where they pad."""
    ids = plan.slot_experts.unsqueeze(-1)
    mixed = None in layout.uniform
    indices = []
    paddings = []
    first = 0
    for bounds, width, total in zip(layout.bounds, layout.widths, layout.totals, strict=True):
        index = bounds[ids] + torch.arange(width, device=ids.device)
        if mixed:
            paddings.append((index >= bounds[ids + 1]).flatten(1))
            index = index.clamp(max=total - 1)
        indices.append((index + first).flatten(1))
        first += total
    return torch.cat(indices, dim=1), torch.cat(paddings, dim=1) if mixed else None


def token_rows(layout: Layout, plan: Plan) -> tuple[Tensor, Tensor | None]:
    """As `slot_rows`, for each token: [T, Σ_l K·max rank_l]."""
    index, padding = slot_rows(layout, plan)
    if plan.tokens_per_row == 1:
        return index, padding
    index = index.repeat_interleave(plan.tokens_per_row, dim=0)
    if padding is not None:
        padding = padding.repeat_interleave(plan.tokens_per_row, dim=0)
    return index, padding


def rank_bags(hs: tuple[Tensor, ...], layout: Layout, plan: Plan) -> tuple[Tensor, Tensor, Tensor]:
    """For each row of the site's F its tokens and their h, row after row, and where each begins.

    h_l [rows, tokens_per_row, K, max rank_l].
    """
    lists = []
    entries = 0
    for linear, h in enumerate(hs):
        tokens, weights, firsts = _linear_bags(h, layout, linear, plan)
        lists.append((tokens, weights, firsts + entries))
        entries += h.numel()
    tokens, weights, firsts = (torch.cat(parts) for parts in zip(*lists, strict=True))
    return tokens, weights, firsts


def _linear_bags(
    h: Tensor, layout: Layout, linear: int, plan: Plan
) -> tuple[Tensor, Tensor, Tensor]:
    """`rank_bags` of one linear: row j of expert e begins at Σ_{i<e} n_i r_i + j n_e."""
    order, experts, starts = plan.sorted_slots
    bounds = layout.bounds[linear]
    total = layout.totals[linear]
    ranks = bounds.diff()
    counts = starts.diff()
    bases = (ranks * counts).cumsum(0) - ranks * counts
    owners = torch.arange(len(ranks), device=h.device)
    owners = owners.repeat_interleave(ranks, output_size=total)
    rows = torch.arange(total, device=h.device) - bounds[owners]
    firsts = bases[owners] + rows * counts[owners]

    columns = torch.arange(h.shape[-1], device=h.device)
    places = torch.arange(len(order), device=h.device) + (bases - starts[:-1])[experts]
    places = torch.addcmul(places[:, None], columns, counts[experts, None])
    if layout.uniform[linear] is None:
        # Past the end goes what is padding; the places left over end the last row's, with h = 0.
        places = places.masked_fill(columns >= ranks[experts, None], h.numel())
    weights = h.new_zeros(h.numel() + 1)
    tokens = order.new_zeros(h.numel() + 1)
    weights[places] = h.reshape(len(order), h.shape[-1])[order]
    tokens[places] = (order // plan.num_slots)[:, None].expand_as(places)
    return tokens[:-1], weights[:-1], firsts


def equal_bags(index: Tensor, bags: int) -> tuple[Tensor, Tensor]:
    """Where each of `bags` equal parts of an index begins [bags], and the part of each entry.

    The same two at every token that is generated: kept by their sizes. Not for a tracer, nor for
    tensors without values.
    """
    size = index.numel() // bags
    if type(index) is not Tensor or torch.compiler.is_compiling():
        return _equal_bags.__wrapped__(bags, size, index.device)
    return _equal_bags(bags, size, index.device)


@lru_cache(maxsize=256)
def _equal_bags(bags: int, size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    firsts = torch.arange(0, bags * size, size, device=device)
    return firsts, torch.arange(bags, device=device).repeat_interleave(size)
