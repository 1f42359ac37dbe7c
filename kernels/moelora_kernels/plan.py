"""The plan: one routing turned into the index arrays that the kernels read."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

PATHS = ("dense", "grouped", "sequence")


@dataclass(frozen=True)
class Plan:
    """A routing in the form of one path; built once, shared by all linears under one router.

    expert_ids [rows, K] int64, -1 = no expert in this slot.
    weights [rows, K], fp32 or fp64, differentiable; 0 in an empty slot.
    slot_experts [rows, K]: expert_ids with 0 in place of -1.
    distinct: no slot is empty and no row names an expert twice.
    memo: what a backend derives from the plan without gradients and wants to keep; `replace` begins a new one.
    """

    path: str
    num_experts: int
    rows: int
    tokens_per_row: int
    expert_ids: Tensor
    weights: Tensor
    slot_experts: Tensor
    distinct: bool = False
    memo: dict[Any, Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def num_tokens(self) -> int:
        """T = rows * tokens_per_row."""
        return self.rows * self.tokens_per_row

    @property
    def num_slots(self) -> int:
        """K, the experts that a row may choose."""
        return self.expert_ids.shape[1]

    @cached_property
    def gate(self) -> Tensor:
        """[rows, E], differentiable: Σ_k weights[:, k] · [expert_ids[:, k] = e], slot after slot.

        A single scatter would add an expert's duplicates by atomics on a GPU, in no fixed order.
        """
        gate = self.weights.new_zeros(self.rows, self.num_experts)
        if self.distinct:
            return gate.scatter(1, self.slot_experts, self.weights)
        for slot in range(self.num_slots):
            column = slice(slot, slot + 1)
            gate = gate.scatter_add(1, self.slot_experts[:, column], self.weights[:, column])
        return gate

    @cached_property
    def sorted_slots(self) -> tuple[Tensor, Tensor, Tensor]:
        """The T * K slots stably sorted by expert, their experts, each expert's first [E + 1]."""
        ids = self.slot_experts
        if self.tokens_per_row != 1:
            ids = ids.repeat_interleave(self.tokens_per_row, dim=0)
        experts, order = ids.view(-1).sort(stable=True)
        bounds = torch.arange(self.num_experts + 1, device=ids.device)
        return order, experts, torch.searchsorted(experts, bounds)


def choose_path(rows: int, tokens_per_row: int, num_experts: int, num_slots: int, total_rank: int) -> str:
    """The path, by the first rule that matches; K = num_slots.

    1. sequence: a row has 16 tokens or more, which pay for gathering its experts' factors; or all
       rows together (decode) gather no more blocks than there are experts, and at most 64.
    2. dense: E <= 4 K. The dense products do E / K times the work of the grouped ones, at about
       4 times their speed (a 2-core CPU, fp32, T = 1024, widths 192..1536, ranks 4..64, fwd + bwd).
    3. grouped: its time does not grow with E.

    Both sides of rule 2 grow with total_rank alike, so no rule reads it so far.
    """
    if tokens_per_row >= 16 or rows * num_slots <= min(num_experts, 64):
        return "sequence"
    return "dense" if num_experts <= 4 * num_slots else "grouped"


def build_plan(
    expert_ids: Tensor,
    expert_weights: Tensor,
    num_experts: int,
    *,
    total_rank: int,
    tokens_per_row: int = 1,
    path: str | None = None,
    validate: bool = False,
    complete: bool = False,
) -> Plan:
    """Turn a routing into a Plan, without waiting for the device.

    expert_ids [rows, K] int64, -1 = no expert; expert_weights [rows, K] fp32 or fp64, which take
    gradients through the plan; total_rank: the largest R of the linears that share the plan.
    An expert named twice in a row counts with the sum of its weights. complete: no slot is
    empty and no row names an expert twice, as with a top-k; it spares looking for such.

    Raises: TypeError, ValueError for dtypes, shapes and an unknown path; with validate (which
    waits for the device) ValueError for an id outside -1..num_experts - 1.
    """
    _check_routing(expert_ids, expert_weights, num_experts, tokens_per_row)
    rows, num_slots = expert_ids.shape
    if path is None:
        path = choose_path(rows, tokens_per_row, num_experts, num_slots, total_rank)
    elif path not in PATHS:
        raise ValueError(f"path={path!r} is unknown: choose one of {', '.join(PATHS)}, or None")
    if validate:
        _check_ids(expert_ids, num_experts)
    slot_experts, weights = expert_ids, expert_weights
    if not complete:
        empty = expert_ids < 0
        slot_experts = expert_ids.masked_fill(empty, 0)
        weights = expert_weights.masked_fill(empty, 0.0)
    return Plan(path, num_experts, rows, tokens_per_row, expert_ids, weights, slot_experts, complete)


def _check_routing(ids: Tensor, weights: Tensor, num_experts: int, tokens_per_row: int) -> None:
    """Raise for a routing of the wrong dtype, shape or device; looks at no value."""
    if ids.dtype != torch.int64:
        raise TypeError(f"expert_ids is {ids.dtype}, expected torch.int64: pass expert_ids.long()")
    if weights.dtype not in (torch.float32, torch.float64):
        raise TypeError(
            f"expert_weights is {weights.dtype}, expected torch.float32 (torch.float64 for checks):"
            " pass expert_weights.float()"
        )
    if ids.dim() != 2 or ids.shape != weights.shape:
        raise ValueError(
            f"expert_ids is {tuple(ids.shape)} and expert_weights {tuple(weights.shape)}, expected"
            " [rows, K] for both: one row a token, or one a sequence with tokens_per_row"
        )
    if ids.device != weights.device:
        raise ValueError(
            f"expert_ids is on {ids.device} and expert_weights on {weights.device}, expected one"
            " device: move one of them"
        )
    if num_experts < 1 or tokens_per_row < 0:
        raise ValueError(
            f"num_experts={num_experts} and tokens_per_row={tokens_per_row}, expected at least"
            " 1 and 0: pass the number of experts and the length of a sequence"
        )


def _check_ids(ids: Tensor, num_experts: int) -> None:
    """Raise for an id that names no expert; waits for the device."""
    low, high = (int(ids.min()), int(ids.max())) if ids.numel() else (-1, -1)
    if low < -1 or high >= num_experts:
        raise ValueError(
            f"expert_ids has values in {low}..{high}, expected -1 (no expert) to {num_experts - 1}:"
            " check the router's number of experts"
        )
