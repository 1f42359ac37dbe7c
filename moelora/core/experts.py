"""The stacked experts: their parameters, read and written by expert in this one place."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from moelora_kernels import Layout
from torch import Tensor, nn

from ..host_internals import is_partitioned

TRAINED = "weight"
FROZEN = "frozen_weight"
# In a state dict's metadata: which experts' rows the frozen ones are.
FROZEN_EXPERTS = "frozen_experts"
# What to do where a state dict is of other experts.
OTHER_EXPERTS = (
    "It is of a mixture with other experts, or other ones among them frozen: load its checkpoint "
    "with from_pretrained, or bring this mixture to the same first (add_expert or remove_expert, "
    "then freeze_experts or unfreeze_experts)."
)


@dataclass(frozen=True)
class LoraFactors:
    """One expert in one linear: A `[r, d_in]` and B `[r, d_out]`, rank-major.

    It adds scaling · (x Aᵀ) B. From a mixture both are views of its own rows: writing into them
    (under `torch.no_grad()`) changes the expert, and with `share_lora_A` A is that of all experts.
    """

    A: Tensor
    B: Tensor
    scaling: float


def is_sharded(tensor: Tensor) -> bool:
    """Whether this process has a part of `tensor` alone (FSDP2's DTensor, ZeRO-3)."""
    return hasattr(tensor, "full_tensor") or is_partitioned(tensor)


class Factor(nn.Module):
    """A stacked low-rank factor `[Σ blocks, width]`: a block of rows for each (linear and) expert.

    The rows that train are one parameter, `weight`. Frozen experts' rows lie in a second one,
    `frozen_weight`, without gradient: rows that shared a trainable parameter would decay under
    AdamW whatever their gradient. Either is None where it would be empty. A state dict has both by
    these names; `merge` makes one tensor of them, which loads whatever is frozen.

    A shared factor has one block for all experts of a linear (HydraLoRA, arXiv:2404.19245). It is
    frozen as a whole while any expert is, whose output would change with it.

    Args:
        ranks: for each linear the rank of each expert.
        width: d_in or d_out.
        scaling: s_e of each expert, where the factor is scaled.
        shared: whether the experts of a linear, which then have one rank, share one block.
    """

    weight: nn.Parameter | None
    frozen_weight: nn.Parameter | None
    # Offloaded: wherever the model goes, the rows stay on the host.
    stays = False

    def __init__(
        self,
        ranks: Sequence[Sequence[int]],
        width: int,
        scaling: Sequence[float] | None = None,
        shared: bool = False,
        **factory,
    ):
        super().__init__()
        self.shared = shared
        self.num_experts = len(ranks[0])
        # A shared block stands under the number of the first expert.
        blocks = [own[:1] if shared else own for own in ranks]
        self.blocks = tuple(rank for own in blocks for rank in own)
        self.experts = tuple(expert for own in blocks for expert in range(len(own)))
        self.width = width
        self.frozen_experts: frozenset[int] = frozenset()
        rows = torch.zeros(sum(self.blocks), width, **factory)
        self.register_parameter(TRAINED, nn.Parameter(rows))
        self.register_parameter(FROZEN, None)
        # Where each expert's rows begin, `[E + 1]`.
        offsets = [tuple(accumulate(own, initial=0)) for own in ranks]
        self.layout = Layout(offsets, scaling, rows.device, shared)

    def layout_on(self, device: torch.device) -> Layout:
        """The layout with its tables on `device`; remembered, as the factor hardly ever moves."""
        # Not buffers: those would be cast with the model, and be empty after `to_empty`.
        if self.layout.device != device:
            self.layout = self.layout.to(device)
        return self.layout

    def _apply(self, fn, recurse=True):
        # A cast is followed, a move is not; no row is taken along to find out.
        super()._apply((lambda rows: rows.to(fn(rows[:0]).dtype)) if self.stays else fn, recurse)
        # Before a first call, which may be one that a compiler or a CUDA graph records.
        for parameter in self.parameters():
            self.layout_on(parameter.device)
        return self

    def reset_kaiming(self) -> None:
        """PEFT's initialisation of lora_A: uniform in ±1/√width, the same for every rank."""
        for rows in self.parameters():
            nn.init.uniform_(rows, -1 / math.sqrt(self.width), 1 / math.sqrt(self.width))

    def stacked(self) -> Tensor:
        """All rows in block order, `[Σ blocks, width]`; to be called inside of `forward`."""
        if self.frozen_weight is None:
            return self.weight  # type: ignore[return-value]
        if self.weight is None:
            assert self.frozen_weight is not None
            return self.frozen_weight
        return self.merge(self.weight, self.frozen_weight)

    def merge(
        self,
        trained: Tensor | None,
        frozen: Tensor | None,
        frozen_experts: frozenset[int] | None = None,
    ) -> Tensor:
        """The rows of both parameters in block order, `[Σ blocks, width]`; `frozen_experts` where
        they are of a mixture in which other experts are frozen.
        """
        blocks: dict[str, Iterator[Tensor]] = {}
        for name, rows in ((TRAINED, trained), (FROZEN, frozen)):
            own = self._sizes(name, frozen_experts)
            blocks[name] = iter(() if rows is None else rows.split(own))
        holders = [self.holder(expert, frozen_experts) for expert in self.experts]
        return torch.cat([next(blocks[holder]) for holder in holders])

    def _sizes(self, name: str, frozen_experts: frozenset[int] | None) -> list[int]:
        """How many rows each block has that the parameter `name` holds."""
        blocks = zip(self.experts, self.blocks)
        return [rows for expert, rows in blocks if self.holder(expert, frozen_experts) == name]

    def split(self, whole: Tensor) -> dict[str, Tensor]:
        """`whole` `[Σ blocks, width]` as the parameters that there are, by name."""
        parts: dict[str, list[Tensor]] = {}
        for expert, rows in zip(self.experts, whole.split(list(self.blocks))):
            parts.setdefault(self.holder(expert), []).append(rows)
        return {name: torch.cat(rows) for name, rows in parts.items()}

    def holder(self, expert: int, frozen_experts: frozenset[int] | None = None) -> str:
        """The name of the parameter that holds the expert's rows, of these frozen experts if not
        its own.
        """
        experts = self.frozen_experts if frozen_experts is None else frozen_experts
        is_frozen = bool(experts) if self.shared else expert in experts
        return FROZEN if is_frozen else TRAINED

    def block(self, linear: int, expert: int) -> Tensor:
        """An expert's rows in linear number `linear` `[r, width]`: a view of their parameter."""
        index = linear if self.shared else linear * self.num_experts + expert
        name = self.holder(self.experts[index])
        before = zip(self.experts[:index], self.blocks)
        start = sum(rows for expert, rows in before if self.holder(expert) == name)
        return self.get_parameter(name).detach()[start : start + self.blocks[index]]

    def set_frozen(self, experts: frozenset[int]) -> None:
        """Freeze exactly the blocks of `experts`; their bits stay.

        Makes new parameters where that changes anything.
        """
        if experts == self.frozen_experts:
            return
        whole = self.stacked().detach()
        before = [self.holder(expert) for expert in self.experts]
        self.frozen_experts = experts
        if [self.holder(expert) for expert in self.experts] == before:
            return
        parts = self.split(whole)
        for name in (TRAINED, FROZEN):
            rows = parts.get(name)
            made = None if rows is None else nn.Parameter(rows, requires_grad=name == TRAINED)
            setattr(self, name, made)

    @torch.no_grad()
    def fill(self, whole: Tensor) -> None:
        """Overwrite all rows with `whole` `[Σ blocks, width]`."""
        for name, rows in self.split(whole).items():
            self.get_parameter(name).copy_(rows)

    @torch.no_grad()
    def carry(self, to: Factor, keep: Sequence[int | None], fresh: Sequence[Tensor | None]) -> None:
        """Fill a factor of changed experts, whose expert i is this one's `keep[i]`.

        Args:
            to: a new factor for `len(keep)` experts.
            keep: for each expert of `to` its number here, or None for a new one, which trains.
            fresh: for each linear the new expert's rows `[r, width]`; None where it is not there,
                and not looked at where the experts share theirs.
        """
        to.fill(self.stacked() if self.shared else self._restacked(keep, fresh))
        to.set_frozen(frozenset(i for i, e in enumerate(keep) if e in self.frozen_experts))
        if to.weight is not None and self.weight is not None:
            to.weight.requires_grad_(self.weight.requires_grad)

    def _restacked(self, keep: Sequence[int | None], fresh: Sequence[Tensor | None]) -> Tensor:
        rows = []
        for linear, own in enumerate(fresh):
            for expert in keep:
                if expert is not None:
                    rows.append(self.block(linear, expert))
                elif own is not None:
                    rows.append(own.to(rows[0] if rows else self.block(0, 0)))
        return torch.cat(rows)

    def merged_state(
        self, state: dict[str, Tensor], prefix: str, frozen_experts: Sequence[int] | None = None
    ) -> None:
        """In `state`, put one tensor of all rows by the name of those that train; where the rows
        are not those of this factor, leave them as they are.

        frozen_experts: those of the mixture that `state` is of, where that is known.
        """
        others = None if frozen_experts is None else frozenset(frozen_experts)
        parts = {name: state.get(prefix + name) for name in (TRAINED, FROZEN)}
        fits = all(
            sum(self._sizes(name, others)) == (0 if rows is None else len(rows))
            for name, rows in parts.items()
        )
        if parts[FROZEN] is not None and fits:
            del state[prefix + FROZEN]
            state[prefix + TRAINED] = self.merge(parts[TRAINED], parts[FROZEN], others)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        # Which rows lie in which parameter cannot be seen from their number.
        metadata = getattr(destination, "_metadata", {}).get(prefix[:-1])
        if metadata is not None:
            metadata[FROZEN_EXPERTS] = sorted(self.frozen_experts)

    def _load_from_state_dict(
        self, state_dict: Mapping, prefix: str, local_metadata: Mapping, *args: Any
    ) -> None:
        frozen = local_metadata.get(FROZEN_EXPERTS)
        if frozen is not None and frozenset(frozen) != self.frozen_experts:
            state_dict = dict(state_dict)
            self.merged_state(state_dict, prefix, frozen)
        whole = state_dict.get(prefix + TRAINED)
        merged = self.frozen_weight is not None and prefix + FROZEN not in state_dict
        if merged and whole is not None and tuple(whole.shape) == (sum(self.blocks), self.width):
            others = {name: rows for name, rows in state_dict.items() if name != prefix + TRAINED}
            state_dict = others | {prefix + name: rows for name, rows in self.split(whole).items()}
        problems = args[-1]
        before = len(problems)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)  # type: ignore[arg-type]
        if len(problems) > before and OTHER_EXPERTS not in problems:
            problems.insert(0, OTHER_EXPERTS)
