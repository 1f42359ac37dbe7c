"""An optimizer that goes on when experts come and go: its state moves along with the rows that
stay.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..core.experts import Factor
from ..routers import Router


@dataclass(frozen=True)
class Moved:
    """A parameter whose rows come from an earlier one.

    Attributes:
        new: the parameter.
        old: the one that its rows come from, or None where all are new.
        pieces: the first row in `old` (None for new rows) and the number of rows, piece by piece.
    """

    new: nn.Parameter
    old: nn.Parameter | None
    pieces: tuple[tuple[int | None, int], ...]


@dataclass(frozen=True)
class PoolChange:
    """Which parameters a change of the experts put in the place of which; see `resume_optimizer`.

    Attributes:
        moved: the parameters that took another one's place, or are new.
        gone: the parameters that are no longer the model's.
    """

    moved: list[Moved] = field(default_factory=list)
    gone: list[nn.Parameter] = field(default_factory=list)

    def replaced(
        self, old: nn.Parameter | None, new: nn.Parameter | None, pieces: Sequence
    ) -> None:
        """Note that `new`, made of `pieces` of `old`, is where `old` was; either may be None."""
        if old is new:
            return
        if old is not None:
            self.gone.append(old)
        if new is not None:
            self.moved.append(Moved(new, old, tuple(pieces)))

    def replaced_rows(self, before: TrainedRows, after: Factor, keep: Sequence[int | None]) -> None:
        """Note what became of a factor whose expert i is the former `keep[i]`."""
        experts = len(set(after.experts))
        pieces = []
        for i, (expert, rows) in enumerate(zip(after.experts, after.blocks)):
            if expert not in after.frozen_experts:
                former = keep[expert]
                start = None if former is None else before.starts.get((i // experts, former))
                pieces.append((start, rows))
        self.replaced(before.parameter, after.weight, pieces)

    def replaced_router(self, before: Router, after: Router, keep: Sequence[int | None]) -> None:
        """Note what became of a router's parameters: rows of experts move, what has other rows
        stays or is new.
        """
        olds = dict(before.named_parameters())
        for name, new in after.named_parameters():
            old = olds.pop(name, None)
            rows = len(new) if new.dim() else 1
            if old is None or old.shape[1:] != new.shape[1:]:
                pieces = [(None, rows)]
            elif name in before.expert_rows:
                pieces = [(former, 1) for former in before.with_null(keep)]
            else:
                # What resize has left as it was keeps its state.
                pieces = [(0 if torch.equal(old, new) else None, rows)]
            self.replaced(old, new, pieces)
        self.gone.extend(olds.values())


class TrainedRows:
    """Where each expert's trained rows lie in a factor's parameter, at this moment."""

    def __init__(self, factor: Factor):
        self.parameter = factor.weight
        self.starts: dict[tuple[int, int], int] = {}
        experts = len(set(factor.experts))
        start = 0
        for i, (expert, rows) in enumerate(zip(factor.experts, factor.blocks)):
            if expert not in factor.frozen_experts:
                self.starts[i // experts, expert] = start
                start += rows


def resume_optimizer(optimizer: Any, *changes: PoolChange) -> None:
    """Let an optimizer (AdamW, SGD … or accelerate's around one) go on after these changes, in
    their order.

    Each new parameter takes its predecessor's place in the parameter groups, and for the rows that
    stayed its state (exp_avg, exp_avg_sq …) and its step. New rows begin with a state of 0 at that
    step: under Adam their first updates are up to (1−β1)/√(1−β2) times the learning rate, about
    three. Call it between optimizer steps.

    Args:
        optimizer: the optimizer to change, in place.
        *changes: what the changes of the experts returned, in their order.

    Raises:
        TypeError: a state that does not belong to single elements, such as Adafactor's: make a new
            optimizer then.
    """
    carried: dict[int, dict[str, Any]] = {}
    for change in changes:
        for moved in change.moved:
            known = carried.get(id(moved.old))
            state: dict = (optimizer.state.get(moved.old) or {}) if known is None else known
            carried[id(moved.new)] = {
                name: _carried(name, value, moved) for name, value in state.items()
            }
    # Nothing is changed before all could be carried.
    for change in changes:
        _take_places(optimizer, change)
        for moved in change.moved:
            if carried[id(moved.new)]:
                optimizer.state[moved.new] = carried[id(moved.new)]
        for parameter in change.gone:
            optimizer.state.pop(parameter, None)


def _carried(name: str, value: Any, moved: Moved) -> Any:
    """One entry of the old parameter's state for the new one."""
    assert moved.old is not None
    if not isinstance(value, Tensor):
        return value
    if value.shape == moved.old.shape and value.dim():
        parts = [
            value.new_zeros(rows, *value.shape[1:])
            if start is None
            else value[start : start + rows]
            for start, rows in moved.pieces
        ]
        return torch.cat(parts)
    if value.numel() == 1:
        return value.clone()
    raise TypeError(
        f"The optimizer keeps {name!r} of shape {tuple(value.shape)} for a parameter of shape "
        f"{tuple(moved.old.shape)}, which cannot be split by expert: make a new optimizer for the "
        "changed model."
    )


def _take_places(optimizer: Any, change: PoolChange) -> None:
    """Put each new parameter where its predecessor is in the groups, and take out what is gone."""
    groups = optimizer.param_groups
    successors = {id(m.old): m.new for m in change.moved if m.old is not None}
    gone = {id(p) for p in change.gone}
    home = None
    for group in groups:
        if home is None and any(id(p) in gone for p in group["params"]):
            home = group
        kept = [successors.get(id(p), p) for p in group["params"]]
        group["params"] = [p for p in kept if id(p) not in gone]
    present = {id(p) for group in groups for p in group["params"]}
    new = [
        m.new
        for m in change.moved
        if id(m.new) not in present and m.old is None and m.new.requires_grad
    ]
    # Rows that were all frozen had no place: they join the others.
    (home or groups[0])["params"].extend(new)
