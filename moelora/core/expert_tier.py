"""`ExpertTier`: a site's experts lie on the host, and a few of them where it computes.

The stacked factors stay what they are, on the CPU or in a checkpoint's file: what reads, saves or
changes experts finds them there. Beside them a site has a bank with slots for a few experts. It
brings those that a plan names, in the place of the ones used longest ago, and computes with a plan
that names slots. Where a batch names more experts than there are slots, it takes several passes.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
from moelora_kernels import Plan, expand, shrink
from torch import Tensor

from .expert_bank import Bank, ints
from .experts import Factor, is_sharded

NO_GRADIENT = (
    "Gradients do not pass through offloaded experts: call model.onload_experts() before you learn "
    "something, or compute under torch.no_grad()."
)
Method = TypeVar("Method", bound=Callable[..., Any])
# The key in a plan's memo of the experts that it names, on the host.
WANTED = "wanted experts"


@dataclass
class Counts:
    """What a site found resident and what it moved; experts are counted once a forward pass.

    Args:
        hits: experts that were there.
        fetched: experts that were brought.
        prefetched: those of them that were brought before the site ran.
        bytes_moved: what came with them.
    """

    hits: int = 0
    fetched: int = 0
    prefetched: int = 0
    bytes_moved: int = 0


@dataclass
class Part:
    """A plan, or the part of it whose experts are resident together.

    Args:
        plan: for the bank, whose slots it names.
        slots: the slot of each expert.
        experts: the experts that `plan` has slots for, in its shape, for what experts have.
        scaled: by the linear's number, the plan whose weights are multiplied by s_e.
    """

    plan: Plan
    slots: dict[int, int]
    experts: Tensor
    scaled: dict[int, Plan] = field(default_factory=dict)

    def plan_for(self, linear: int, bank: Bank) -> Plan:
        """The plan to expand with."""
        if bank.scales is None:
            return self.plan
        if linear not in self.scaled:
            weights = self.plan.weights
            scales = bank.scales.to(weights.dtype)[self.experts]
            self.scaled[linear] = replace(self.plan, weights=weights * scales)
        return self.scaled[linear]


# What a linear's expand needs of the shrink: of each part its h.
Shrunk = tuple[tuple[Part, Tensor], ...]


def _outside_of_graphs(function: Method) -> Method:
    """The host looks at what was chosen, which a compiled graph cannot."""
    return torch.compiler.disable(function)  # type: ignore[return-value]


class ExpertTier:
    """The experts of a site of which few are resident; the least recently used one makes room.

    Each site has its own slots: its router chooses for it, its rows have sizes of their own, and
    memory is known before. Threads take turns at a site. What is computed does not depend on which
    experts were resident before.

    Args:
        factors: gives the site's `lora_A` and the `lora_B` of its linears.
        resident: how many experts are resident at most.

    Attributes:
        counts: what was found and what was moved so far.
    """

    def __init__(self, factors: Callable[[], list[Factor]], resident: int):
        self.factors = factors
        self.resident = resident
        self.counts = Counts()
        self._reset()

    def __getstate__(self) -> dict[str, Any]:
        return {"factors": self.factors, "resident": self.resident, "counts": self.counts}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Be a copy: with nothing resident."""
        self.__dict__.update(state)
        self._reset()

    def _reset(self) -> None:
        self.lock = threading.Lock()
        # By which plans remember their part; not the tier itself, which a copied plan would copy.
        self.key = object()
        self.stream: Any = None
        self._forget()

    def _forget(self) -> None:
        """Let nothing be resident any more."""
        self.banks: list[Bank] = []
        self.seen: Sequence[tuple[Tensor, int]] = ()
        # The slot of each resident expert, the least recently used first.
        self.slot_of: OrderedDict[int, int] = OrderedDict()
        self.expert_in: dict[int, int] = {}
        self.free: list[int] = []
        self.ahead: set[int] = set()

    def resident_bytes(self) -> int:
        """What the slots take where they are; 0 before the first forward pass."""
        return sum(bank.rows.nbytes for bank in self.banks)

    @_outside_of_graphs
    def shrink(self, x: Tensor, plan: Plan) -> tuple[Shrunk, ...]:
        """x A_lᵀ of the experts that `plan` names, for every linear l."""
        found = []
        with self.lock, torch.no_grad():
            self._prepare(x.device)
            bank = self.banks[0]
            for part in self._parts(plan):
                hs = shrink(x, bank.rows, bank.layout, part.plan, checked=True)
                found.append([(part, h) for h in hs])
        return tuple(zip(*found, strict=True))

    @_outside_of_graphs
    def expand(
        self,
        shrunk: Shrunk,
        linear: int,
        output: Tensor,
        inplace: bool,
        activation: Callable[[Tensor], Tensor] | None,
    ) -> Tensor:
        """`output + Σ_e w_e s_e φ(h_e) B_e` of one linear; a backward pass through it raises.

        Args:
            shrunk: from `shrink`.
            linear: the linear's number in the site.
            output: what the linear gave, `[…, d_out]`.
            inplace: whether `output` may be written into.
            activation: φ, or None.
        """
        sources = (output, shrunk[0][0].plan.weights, *(rows for rows, _ in self.seen))
        learns = torch.is_grad_enabled() and any(t.requires_grad for t in sources)
        result = output
        inplace = inplace and not learns
        with self.lock, torch.no_grad():
            self._prepare(output.device)
            for part, h in shrunk:
                # Another part, or thread, may have taken its slots.
                self._bring(part.slots)
                bank = self.banks[1 + linear]
                plan = part.plan_for(linear, bank)
                h = h if activation is None else activation(h)
                args = (bank.rows, bank.layout, plan, result)
                result = expand(h, *args, inplace=inplace, checked=True)
                # After the first one it is ours.
                inplace = True
        return _WithoutGradient.apply([result], *sources) if learns else result

    @_outside_of_graphs
    def prefetch(self, plan: Plan) -> None:
        """Bring the experts that `plan` names, as many as there is room for, before they are used.

        Args:
            plan: that the site will compute with.
        """
        with self.lock, torch.no_grad():
            device = self.banks[0].rows.device if self.banks else plan.weights.device
            self._prepare(device)
            wanted = _wanted(plan)[: self.num_slots]
            missing = [expert for expert in wanted if expert not in self.slot_of]
            self._bring(self._assigned(wanted))
            self.ahead.update(missing)
            self.counts.prefetched += len(missing)

    def _prepare(self, device: torch.device) -> None:
        """Make the banks where there are none; forget what is resident where experts changed."""
        own = self.factors()
        now = [
            (rows, 0 if rows.is_inference() else rows._version)
            for factor in own
            for rows in factor._parameters.values()
            if rows is not None
        ]
        same = len(now) == len(self.seen) and all(
            one is other and version == before
            for (one, version), (other, before) in zip(now, self.seen)
        )
        if not same or self.banks[0].rows.device != device:
            if any(rows.is_meta or is_sharded(rows) for rows, _ in now):
                raise ValueError(
                    "The experts were offloaded (offload_experts) and then handed to an engine "
                    "that keeps them elsewhere or in parts: call model.onload_experts() before."
                )
            self._forget()
            self.num_slots = min(self.resident, own[0].num_experts)
            self.free = list(range(self.num_slots))
            self.banks = [Bank(factor, self.num_slots, device) for factor in own]
            self.seen = now
        if device.type == "cuda":
            # Another thread's kernels may still read the slots.
            stream = torch.cuda.current_stream(device)
            if self.stream not in (None, stream):
                stream.wait_stream(self.stream)
            self.stream = stream

    def _parts(self, plan: Plan) -> Iterator[Part]:
        """The parts of a plan in turn, with their experts resident."""
        wanted = _wanted(plan)
        known = plan.memo.get(self.key)
        if known is not None and all(
            self.slot_of.get(expert) == slot for expert, slot in known.slots.items()
        ):
            self._count(wanted)
            self._bring(known.slots)
            yield known
            return
        # Always the same parts, whatever is resident: sums are taken in the same order.
        groups = [
            wanted[first : first + self.num_slots]
            for first in range(0, max(len(wanted), 1), self.num_slots)
        ]
        for group in groups:
            self._count(group)
            slots = self._assigned(group)
            self._bring(slots)
            part = _part(plan, slots, self.num_slots, is_whole=len(groups) == 1)
            if len(groups) == 1:
                plan.memo[self.key] = part
            yield part

    def _count(self, experts: Sequence[int]) -> None:
        """Count who is found resident, but for those that were brought ahead for this."""
        found = [expert for expert in experts if expert in self.slot_of]
        self.counts.hits += sum(expert not in self.ahead for expert in found)
        self.ahead.difference_update(experts)

    def _assigned(self, experts: Sequence[int]) -> dict[int, int]:
        """A slot for each expert: the one that it has, else a free one, else another's."""
        slots = {expert: self.slot_of[expert] for expert in experts if expert in self.slot_of}
        taken = set(slots.values())
        others = (slot for slot in self.slot_of.values() if slot not in taken)
        left = iter([*self.free, *others])
        return {expert: slots[expert] if expert in slots else next(left) for expert in experts}

    def _bring(self, slots: dict[int, int]) -> None:
        """Have each expert in its slot; they are the last that were used."""
        missing = {e: slot for e, slot in slots.items() if self.slot_of.get(e) != slot}
        if missing:
            self._fetch(missing)
        for expert in slots:
            self.slot_of.move_to_end(expert)

    def _fetch(self, slots: dict[int, int]) -> None:
        for expert, slot in slots.items():
            for other in (self.expert_in.get(slot), expert):
                if other in self.slot_of:
                    self.free.append(self.slot_of[other])
                    del self.expert_in[self.slot_of.pop(other)]
        try:
            moved = sum(bank.fetch(list(slots), list(slots.values())) for bank in self.banks)
        except BaseException:
            # Some of the rows may be there and others not.
            self._forget()
            raise
        for expert, slot in slots.items():
            self.slot_of[expert] = slot
            self.expert_in[slot] = expert
        self.free = [slot for slot in self.free if slot not in self.expert_in]
        self.counts.fetched += len(slots)
        self.counts.bytes_moved += moved


class _WithoutGradient(torch.autograd.Function):
    """A value that was computed without gradients: the backward pass says so instead of leaving
    them out.
    """

    @staticmethod
    def forward(ctx: Any, value: list[Tensor], *sources: Tensor) -> Tensor:
        return value[0]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        raise RuntimeError(NO_GRADIENT)


def _wanted(plan: Plan) -> list[int]:
    """The experts that a plan names, in their order; the host waits for it once a plan."""
    wanted = plan.memo.get(WANTED)
    if wanted is None:
        ids = plan.expert_ids.unique().tolist()
        plan.memo[WANTED] = wanted = [expert for expert in ids if expert >= 0]
    return wanted


def _part(plan: Plan, slots: dict[int, int], num_slots: int, is_whole: bool) -> Part:
    """What of `plan` these experts do, with the slots that they have in the place of their ids."""
    table = ints([-1]).repeat(plan.num_experts)
    table[ints(slots)] = ints(slots.values())
    ids = table.to(plan.expert_ids.device)[plan.slot_experts]
    weights = plan.weights
    distinct = is_whole and plan.distinct
    filled = ids
    if not distinct:
        out = (plan.expert_ids < 0) | (ids < 0)
        # What is not there reads a slot that is.
        filled = ids.masked_fill(out, next(iter(slots.values()), 0))
        ids = ids.masked_fill(out, -1)
        weights = weights.masked_fill(out, 0.0)
    # Products of all experts would add in the order of the slots.
    path = "grouped" if plan.path in ("dense", "matmul") else plan.path
    own = replace(
        plan,
        path=path,
        num_experts=num_slots,
        expert_ids=ids,
        slot_experts=filled,
        weights=weights,
        distinct=distinct,
    )
    return Part(own, slots, plan.slot_experts)
