"""`Bank`: a few experts' rows of one factor, copied to where they are computed with."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from moelora_kernels import Layout
from torch import Tensor

from .experts import FROZEN, TRAINED, Factor


class Bank:
    """Slots for some experts' rows of a factor: of every linear, one slot after another.

    Experts of a lower rank than the linear's largest are filled up with zeros.

    Args:
        factor: whose rows they are.
        slots: how many experts there is room for.
        device: where.
    """

    def __init__(self, factor: Factor, slots: int, device: torch.device):
        self.factor = factor
        like = next(factor.parameters())
        own = factor.layout
        self.widths = ints(own.widths)
        offsets = [[slot * width for slot in range(slots + 1)] for width in own.widths]
        # Where experts scale differently their weights are multiplied instead: s_e of each.
        self.scales = None
        scaling = None if own.scaling is None else (own.scale or 1.0,) * slots
        if own.scaling is not None and own.scale is None:
            self.scales = torch.tensor(own.scaling, dtype=torch.float64).to(device)
        self.layout = Layout(offsets, scaling, device, own.shared)
        self.firsts = ints([0, *(of[-1] for of in offsets)]).cumsum(0)[:-1]
        # A tensor made in inference mode could not be written into outside of it.
        with torch.inference_mode(False):
            if own.shared:
                # What all experts share is always there.
                self.rows = factor.stacked().detach().to(device, copy=True)
            else:
                self.rows = like.new_zeros(self.layout.rows, factor.width, device=device)
        self._read_blocks()

    def _read_blocks(self) -> None:
        """Where each block lies, `[L, E]`: its parameter, its first row there, its rank."""
        first = {TRAINED: 0, FROZEN: 0}
        firsts = []
        frozen = []
        for expert, rank in zip(self.factor.experts, self.factor.blocks):
            name = self.factor.holder(expert)
            firsts.append(first[name])
            frozen.append(name == FROZEN)
            first[name] += rank
        shape = (len(self.widths), -1)
        self.sources = ints(firsts).view(shape)
        self.frozen = ints(frozen).view(shape).bool()
        self.ranks = ints(self.factor.blocks).view(shape)

    def fetch(self, experts: Sequence[int], slots: Sequence[int]) -> int:
        """Bring the rows of `experts` into `slots`; returns how many bytes that were."""
        if self.factor.shared:
            return 0
        chosen = ints(experts)
        step = ints(range(max(self.widths.tolist())))
        widths = self.widths[:, None, None]
        # Of each linear, expert and rank, `[L, n, widest]`: whether there is a row for it in the
        # bank, whether the expert has one, where it goes, where it comes from.
        to_fill = (step < widths).expand(-1, len(experts), -1)
        there = (step < self.ranks[:, chosen, None])[to_fill]
        target = (self.firsts[:, None, None] + ints(slots)[:, None] * widths) + step
        source = (self.sources[:, chosen, None] + step)[to_fill]
        frozen = self.frozen[:, chosen, None].expand_as(to_fill)[to_fill]
        device = self.rows.device
        pinned = device.type == "cuda"
        shape = (len(source), self.factor.width)
        rows = torch.zeros(shape, dtype=self.rows.dtype, pin_memory=pinned, device="cpu")
        for name, held in ((TRAINED, ~frozen), (FROZEN, frozen)):
            mine = held & there
            home = self.factor.get_parameter(name) if bool(mine.any()) else None
            if home is not None and bool(mine.all()):
                torch.index_select(home, 0, source, out=rows)
            elif home is not None:
                rows[mine] = home[source[mine]]
        target = target[to_fill].to(device)
        self.rows.index_copy_(0, target, rows.to(device, non_blocking=True))
        return rows.nbytes


def ints(values: Iterable[int]) -> Tensor:
    """On the host, whatever the default device is."""
    return torch.tensor(list(values), dtype=torch.int64, device="cpu")
