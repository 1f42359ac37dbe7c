"""`ForwardState`: what one forward pass of the model tells its routers, and what they leave for its
output.

It lives from the call of the model to the end of its backward pass: gradient checkpointing
recomputes a layer with the state of the forward pass that it belongs to.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..routers import Routing
from .losses import IGNORE
from .overrides import Forcing

if TYPE_CHECKING:
    from moelora_kernels import Plan


class RoutingDone(Exception):
    """Ends a forward pass of which nothing but the routing is wanted; `run_forward` catches it."""


@dataclass
class ForwardState:
    """One forward pass over `batch` sequences of `length` tokens.

    token_mask: `[batch, length]` bool, the tokens that are no padding; None where all are.
    prompt_mask: `[batch, length]` bool, what a sequence router reads; None where it reads all.
    carried: one `Routing` a router, of an earlier step of the same generation.
    expert_targets: `[batch]` or `[batch, length]` expert numbers, −100 to leave out.
    num_items: the loss's denominator over all micro-batches of the optimizer step, if the loop gave
    one.
    sequences_are_items: `num_items` counts sequences (classification), not tokens.
    forcing: what the routers may not decide.
    routing_only: the forward stops once the last router has routed, and its routings take
    gradients.
    loss_gradient: d(what backward was called on)/d(loss); read by `probe_loss`, else the given
    factor.
    """

    batch: int
    length: int
    token_mask: Tensor | None = None
    prompt_mask: Tensor | None = None
    carried: tuple[Routing, ...] | None = None
    expert_targets: Tensor | None = None
    num_items: Tensor | int | None = None
    sequences_are_items: bool = False
    with_losses: bool = False
    keep_routings: bool = False
    routing_only: bool = False
    forcing: Forcing | None = None
    loss_gradient: Tensor | float = 1.0

    shared: tuple[Routing, Plan] | None = None
    routings: dict[int, Routing] = field(default_factory=dict)
    loss_values: dict[int, Tensor] = field(default_factory=dict)
    counts: dict[int, Tensor] = field(default_factory=dict)
    closed: bool = False

    @contextmanager
    def forced_by(self, weights: Tensor | None) -> Iterator[None]:
        """While inside, these are the forced weights: an explicit input of a checkpointed layer."""
        before = self.forcing
        if before is not None and weights is not None:
            self.forcing = replace(before, expert_weights=weights)
        try:
            yield
        finally:
            self.forcing = before

    def mask_of(self, leading: tuple[int, ...]) -> Tensor | None:
        """The token mask for a tensor `[*leading, d]`: flat, or None where it has no token axis or
        no padding.
        """
        if self.token_mask is None or _product(leading) != self.batch * self.length:
            return None
        return self.token_mask.reshape(-1)

    def row_weights(self, rows: int, device: torch.device) -> Tensor:
        """What each of `rows` routed rows counts for in a loss, `[rows]` fp32.

        In tokens where the loss counts tokens (a sequence: all its tokens), in sequences where it
        counts those (a token: its share of its sequence). The sum over any cut into micro-batches
        is the same.
        """
        if rows not in (self.batch, self.batch * self.length):
            return torch.ones(rows, device=device)
        if self.token_mask is None:
            mask = torch.ones(self.batch, self.length, device=device)
        else:
            mask = self.token_mask.to(device=device, dtype=torch.float32)
        if self.sequences_are_items:
            mask = mask / mask.sum(1, keepdim=True).clamp(min=1)
        return mask.reshape(-1) if rows == mask.numel() else mask.sum(1)

    def targets_of(self, rows: int) -> Tensor | None:
        """`expert_targets` for `rows` routed rows `[rows]`, or None; a sequence's target is that of
        all its tokens.
        """
        targets = self.expert_targets
        if targets is None:
            return None
        if targets.dim() == 1 and rows == self.batch * self.length:
            targets = targets.repeat_interleave(self.length)
        if targets.numel() != rows:
            return None
        if self.token_mask is not None and rows == self.token_mask.numel():
            targets = targets.reshape(-1).masked_fill(~self.token_mask.reshape(-1), IGNORE)
        return targets.reshape(-1)

    def denominator(self, weights: Tensor) -> Tensor:
        """What the sum of the row losses is divided by: the loop's `num_items`, else this batch's
        own weight.
        """
        if self.num_items is None:
            return weights.sum().clamp(min=1e-9)
        if isinstance(self.num_items, Tensor):
            # DataParallel hands each replica a copy of the same number.
            return self.num_items.to(weights).reshape(-1)[0]
        return weights.new_tensor(float(self.num_items))


def _product(numbers: tuple[int, ...]) -> int:
    result = 1
    for n in numbers:
        result *= n
    return result
