"""An optimizer that goes on when experts come and go: its state moves along with the rows that
stay.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..core.experts import TRAINED, Factor
from ..routers import Router

# A factor's parameter, and of each of its rows the linear, the expert, and its number in this.
Trained = tuple[nn.Parameter | None, list[tuple[int, int, int]]]


@dataclass(frozen=True)
class Moved:
    """A parameter and for each of its rows the former one, in `old`; -1 for new rows."""

    new: nn.Parameter
    old: nn.Parameter | None
    rows: Sequence[int]


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
        self, old: nn.Parameter | None, new: nn.Parameter | None, rows: Sequence[int]
    ) -> None:
        """Note that `new`, made of these rows of `old`, is where `old` was; either may be None."""
        if old is new:
            return
        if old is not None:
            self.gone.append(old)
        if new is not None:
            self.moved.append(Moved(new, old, rows))

    def replaced_rows(self, before: Trained, after: Trained, keep: Sequence[int | None]) -> None:
        """Note what became of a factor, whose expert i is the former `keep[i]`."""
        old, old_rows = before
        new, new_rows = after
        former: dict[Any, int] = {row: place for place, row in enumerate(old_rows)}
        self.replaced(old, new, [former.get((n, keep[e], i), -1) for n, e, i in new_rows])

    def replaced_router(self, before: Router, after: Router, keep: Sequence[int | None]) -> None:
        """Note what became of a router's parameters: rows of experts move, what has other rows
        stays or is new.
        """
        olds = dict(before.named_parameters())
        for name, new in after.named_parameters():
            old = olds.pop(name, None)
            rows = [-1] * (len(new) if new.dim() else 1)
            if old is not None and old.shape[1:] == new.shape[1:]:
                if name in before.expert_rows:
                    rows = [-1 if former is None else former for former in before.with_null(keep)]
                elif torch.equal(old, new):
                    # What resize has left as it was keeps its state.
                    rows = range(len(rows))
            self.replaced(old, new, rows)
        self.gone.extend(olds.values())


def trained(factor: Factor) -> Trained:
    """What of a factor trains at this moment."""
    experts = 1 if factor.shared else factor.num_experts
    rows = [
        (block // experts, expert, i)
        for block, (expert, size) in enumerate(zip(factor.experts, factor.blocks))
        if factor.holder(expert) == TRAINED
        for i in range(size)
    ]
    return factor.weight, rows


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
            state = carried.get(id(moved.old), optimizer.state.get(moved.old) or {})
            carried[id(moved.new)] = {
                name: _carried(name, value, moved) for name, value in state.items()
            }
    # Nothing is changed before all could be carried.
    for change in changes:
        gone = {id(p) for p in change.gone}
        # Rows that were all frozen had no place: they join the others.
        groups = optimizer.param_groups
        home = next((g for g in groups if any(id(p) in gone for p in g["params"])), groups[0])
        successors = {id(m.old): m.new for m in change.moved}
        for group in groups:
            kept = [successors.get(id(p), p) for p in group["params"]]
            group["params"] = [p for p in kept if id(p) not in gone]
        present = {id(p) for group in groups for p in group["params"]}
        for moved in change.moved:
            if moved.old is None and moved.new.requires_grad and id(moved.new) not in present:
                home["params"].append(moved.new)
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
        # The last row is what new ones begin with.
        with_zeros = torch.cat([value, value.new_zeros(1, *value.shape[1:])])
        return with_zeros[list(moved.rows)]
    if value.numel() == 1:
        return value.clone()
    raise TypeError(
        f"The optimizer keeps {name!r} of shape {tuple(value.shape)} for a parameter of shape "
        f"{tuple(moved.old.shape)}, which cannot be split by expert: make a new optimizer."
    )
