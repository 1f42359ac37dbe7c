"""Which rows of a stacked factor belong to which expert: as numbers for the host, and as tables."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise

import torch

Offsets = tuple[int, ...]


class Layout:
    """The stacked factor of a site of L linears with E experts, Σ_l R_l rows in all.

    Made once for a factor, for copying the tables to a device makes the host wait. A lora_A that
    all experts of a linear share (HydraLoRA, arXiv:2404.19245) holds the rows of one expert for
    each linear; its layout has the offsets of all E, as if each had a copy. Offsets are the
    E + 1 places where the experts' rows begin; ranks may differ, and may be 0.

    Attributes:
        rank_offsets: L tuples of offsets.
        scaling: s_e of each expert, or None for a factor that is not scaled (lora_A).
        scale: s_e where all experts scale alike, else None.
        shared: whether the factor has one block of rows for all experts of a linear.
        num_experts, num_linears: E and L.
        total_rank: Σ_l R_l.
        rows: the rows of the factor: Σ_l R_l, or Σ_l r_l of one that is shared.
        max_rank: the largest rank of an expert in any linear.
        expert_ranks: each expert's rank in each linear, on the host.
        totals, widths: R_l and the largest rank of each linear.
        uniform: for each linear the rank of all its experts, or None where ranks differ.
        alike: the rank of every expert in every linear; None where ranks differ or are 0.
        experts: [Σ_l R_l] int32, the expert of each row.
        starts, ranks: [L · E] int32, each expert's first row and its rank in each linear.
        bounds: [L, E + 1] int64, `rank_offsets`.
        scales: [E] fp32, `scaling`; ones where it is None.
        blocks: [E, L · rank] int64, each expert's rows in all linears; firsts [E, L] int64, these
            divided by rank; both None where `alike` is.

    Args:
        rank_offsets: L tuples of offsets.
        scaling: E numbers, or None.
        device: where the tables lie.
        shared: one block of rows for all experts of a linear.

    Raises:
        ValueError: for offsets that fall, do not begin with 0 or are of different lengths, for
            another number of scalings than of experts, and for a shared factor of several ranks.
    """

    def __init__(
        self,
        rank_offsets: Sequence[Sequence[int]],
        scaling: Sequence[float] | None = None,
        device: torch.device | str = "cpu",
        shared: bool = False,
    ):
        self.shared = shared
        self.rank_offsets = tuple(tuple(offsets) for offsets in rank_offsets)
        self.scaling = None if scaling is None else tuple(scaling)
        self.device = torch.device(device)
        self.num_linears = len(self.rank_offsets)
        self.num_experts = len(self.rank_offsets[0]) - 1
        self._check()
        ranks = tuple(tuple(b - a for a, b in pairwise(own)) for own in self.rank_offsets)
        self.expert_ranks = ranks
        self.totals = tuple(offsets[-1] for offsets in self.rank_offsets)
        self.total_rank = sum(self.totals)
        self.widths = tuple(max(own) for own in ranks)
        self.max_rank = max(self.widths)
        self.uniform = tuple(own[0] if len(set(own)) == 1 else None for own in ranks)
        self._check_shared()
        self.rows = sum(self.widths) if shared else self.total_rank
        self.alike = (self.uniform[0] or None) if len(set(self.uniform)) == 1 else None
        self.scale = None
        if self.scaling is not None and len(set(self.scaling)) == 1:
            self.scale = float(self.scaling[0])
        self._make_tables()

    def to(self, device: torch.device) -> Layout:
        """The same layout with its tables on `device`."""
        if device == self.device:
            return self
        return Layout(self.rank_offsets, self.scaling, device, self.shared)

    def _check(self) -> None:
        experts = self.num_experts
        for offsets in self.rank_offsets:
            if len(offsets) != experts + 1 or offsets[0] != 0 or sorted(offsets) != [*offsets]:
                raise ValueError(
                    f"rank_offsets of a linear is {offsets}, expected {experts + 1} ints from 0 on,"
                    " never falling: pass the running sums of the experts' ranks"
                )
        if experts < 1:
            raise ValueError(f"rank_offsets is {self.rank_offsets}, expected at least one expert")
        if self.scaling is not None and len(self.scaling) != experts:
            raise ValueError(
                f"scaling has {len(self.scaling)} values, expected one for each of the {experts}"
                " experts: pass lora_alpha_e / r_e of every expert"
            )

    def _check_shared(self) -> None:
        if self.shared and None in self.uniform:
            raise ValueError(
                f"the experts of a shared factor have the ranks {self.expert_ranks}, expected one"
                " rank in each linear: experts of other ranks cannot share their rows"
            )

    def _make_tables(self) -> None:
        flat = [rank for own in self.expert_ranks for rank in own]
        # On the host first, whatever the default device is.
        lengths = torch.tensor(flat, dtype=torch.int32, device="cpu")
        experts = torch.arange(self.num_experts, dtype=torch.int32, device="cpu")
        experts = experts.repeat(self.num_linears).repeat_interleave(lengths)
        scaling = self.scaling or (1.0,) * self.num_experts
        self.experts = experts.to(self.device)
        self.starts = (lengths.cumsum(0) - lengths).int().to(self.device)
        self.ranks = lengths.to(self.device)
        self.bounds = torch.tensor(self.rank_offsets, device="cpu").to(self.device)
        self.scales = torch.tensor(scaling, dtype=torch.float32, device="cpu").to(self.device)
        self.blocks = self.firsts = None
        if self.alike is not None:
            rows = torch.arange(self.total_rank, device="cpu")
            rows = rows.view(self.num_linears, self.num_experts, -1).transpose(0, 1).flatten(1)
            self.blocks = rows.contiguous().to(self.device)
            self.firsts = self.blocks[:, :: self.alike] // self.alike


@lru_cache(maxsize=256)
def layout_of(
    rank_offsets: Offsets, scaling: tuple[float, ...] | None, device: torch.device
) -> Layout:
    """The layout of one linear, kept for who calls with numbers."""
    return Layout((rank_offsets,), scaling, device)
