"""Which row of a stacked factor belongs to which expert, as constant tables on the device."""

from __future__ import annotations

from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor


class Layout(NamedTuple):
    """The stacked factor of a site of L linears with E experts, R = Σ_l R_l rows in all.

    experts [R] int32: the expert of each row. starts, ranks [L * E] int32: each expert's first row
    and its rank in each linear. max_rank: the largest of them.
    """

    num_experts: int
    num_linears: int
    total_rank: int
    max_rank: int
    experts: Tensor
    starts: Tensor
    ranks: Tensor


def sizes(offsets: tuple[int, ...], num_experts: int) -> tuple[int, int, int]:
    """(L, R, largest rank) of the E + 1 offsets of each of L linears, one after another."""
    linears = len(offsets) // (num_experts + 1)
    last = [offsets[(linear + 1) * (num_experts + 1) - 1] for linear in range(linears)]
    # Between two linears the offsets fall back to 0, which is not a rank.
    return linears, sum(last), max((b - a for a, b in pairwise(offsets)), default=0)


@lru_cache(maxsize=1024)
def layout(offsets: tuple[int, ...], num_experts: int, device: torch.device) -> Layout:
    """The tables of a site; kept, since copying them from the host would make each launch wait."""
    linears, total, largest = sizes(offsets, num_experts)
    starts = []
    ranks = []
    experts = []
    first = 0
    for linear in range(linears):
        own = offsets[linear * (num_experts + 1) : (linear + 1) * (num_experts + 1)]
        for expert, (begin, end) in enumerate(pairwise(own)):
            starts.append(first + begin)
            ranks.append(end - begin)
            experts += [expert] * (end - begin)
        first += own[-1]
    tables = (torch.tensor(v, dtype=torch.int32, device=device) for v in (experts, starts, ranks))
    return Layout(num_experts, linears, total, largest, *tables)


@lru_cache(maxsize=1024)
def scales(scaling: tuple[float, ...], device: torch.device) -> Tensor:
    """s_e [E] fp32."""
    return torch.tensor(scaling, dtype=torch.float32, device=device)
