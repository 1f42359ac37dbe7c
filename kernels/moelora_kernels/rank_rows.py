"""Which rows of a stacked factor belong to which expert, slot and token."""

from __future__ import annotations

from functools import lru_cache
from itertools import pairwise

import torch
from torch import Tensor

from .plan import Plan

Offsets = tuple[int, ...]
Site = tuple[Offsets, ...]


@lru_cache(maxsize=256)
def uniform_rank(offsets: Offsets) -> int | None:
    """The rank of every expert, or None if ranks differ."""
    total = offsets[-1]
    experts = len(offsets) - 1
    if total == 0:
        return 0
    rank = total // experts
    return rank if rank and offsets == tuple(range(0, total + 1, rank)) else None


def ranks_of(offsets: Offsets) -> list[int]:
    """The rank of each expert."""
    return [stop - start for start, stop in pairwise(offsets)]


def max_rank(offsets: Offsets) -> int:
    """The largest rank of an expert."""
    rank = uniform_rank(offsets)
    return max(ranks_of(offsets)) if rank is None else rank


def slot_rows(site: Site, plan: Plan) -> tuple[Tensor, Tensor | None]:
    """Which rows of F each routing row needs, [rows, Σ_l K·max rank_l], and where they pad."""
    ids = plan.slot_experts.unsqueeze(-1)
    mixed = any(uniform_rank(offsets) is None for offsets in site)
    indices = []
    paddings = []
    first = 0
    for offsets in site:
        bounds = _bounds(offsets, ids.device)
        index = bounds[ids] + torch.arange(max_rank(offsets), device=ids.device)
        if mixed:
            paddings.append((index >= bounds[ids + 1]).flatten(1))
            index = index.clamp(max=offsets[-1] - 1)
        indices.append((index + first).flatten(1))
        first += offsets[-1]
    return torch.cat(indices, dim=1), torch.cat(paddings, dim=1) if mixed else None


def token_rows(site: Site, plan: Plan) -> tuple[Tensor, Tensor | None]:
    """As `slot_rows`, for each token: [T, Σ_l K·max rank_l]."""
    index, padding = slot_rows(site, plan)
    if plan.tokens_per_row == 1:
        return index, padding
    index = index.repeat_interleave(plan.tokens_per_row, dim=0)
    if padding is not None:
        padding = padding.repeat_interleave(plan.tokens_per_row, dim=0)
    return index, padding


def rank_bags(hs: tuple[Tensor, ...], site: Site, plan: Plan) -> tuple[Tensor, Tensor, Tensor]:
    """For each row of the site's F its tokens and their h, row after row, and where each begins.

    h_l [rows, tokens_per_row, K, max rank_l].
    """
    lists = []
    entries = 0
    for h, offsets in zip(hs, site, strict=True):
        tokens, weights, firsts = _linear_bags(h, offsets, plan)
        lists.append((tokens, weights, firsts + entries))
        entries += h.numel()
    tokens, weights, firsts = (torch.cat(parts) for parts in zip(*lists, strict=True))
    return tokens, weights, firsts


def _linear_bags(h: Tensor, offsets: Offsets, plan: Plan) -> tuple[Tensor, Tensor, Tensor]:
    """`rank_bags` of one linear: row j of expert e begins at Σ_{i<e} n_i r_i + j n_e."""
    order, experts, starts = plan.sorted_slots
    bounds = _bounds(offsets, h.device)
    ranks = bounds.diff()
    counts = starts.diff()
    bases = (ranks * counts).cumsum(0) - ranks * counts
    owners = torch.arange(len(ranks), device=h.device)
    owners = owners.repeat_interleave(ranks, output_size=offsets[-1])
    rows = torch.arange(offsets[-1], device=h.device) - bounds[owners]
    firsts = bases[owners] + rows * counts[owners]

    columns = torch.arange(h.shape[-1], device=h.device)
    places = torch.arange(len(order), device=h.device) + (bases - starts[:-1])[experts]
    places = torch.addcmul(places[:, None], columns, counts[experts, None])
    if uniform_rank(offsets) is None:
        # Past the end goes what is padding; the places left over end the last row's, with h = 0.
        places = places.masked_fill(columns >= ranks[experts, None], h.numel())
    weights = h.new_zeros(h.numel() + 1)
    tokens = order.new_zeros(h.numel() + 1)
    weights[places] = h.reshape(len(order), h.shape[-1])[order]
    tokens[places] = (order // plan.num_slots)[:, None].expand_as(places)
    return tokens[:-1], weights[:-1], firsts


def _bounds(offsets: Offsets, device: torch.device) -> Tensor:
    """offsets [E + 1] as a tensor, without a copy from the host where ranks are alike."""
    rank = uniform_rank(offsets)
    if not rank:
        return torch.tensor(offsets, device=device)
    return torch.arange(0, offsets[-1] + 1, rank, device=device)
