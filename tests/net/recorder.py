"""`Recorder`: what one case computed, by quantity."""

from __future__ import annotations

from typing import Any

import torch
from access import counts, trainable
from torch import Tensor

Recorded = dict[str, Any]


class Recorder:
    """One case: what it computed, by quantity."""

    def __init__(self, model: Any, frozen: frozenset[int] = frozenset()):
        self.model = model
        self.frozen = frozen
        self.kept: Recorded = {}
        self.optimizer = torch.optim.AdamW(
            [p for p in model.parameters() if p.requires_grad], lr=1e-2
        )

    def keep(self, what: str, value: Any) -> None:
        """Keep a tensor, a number, a string, or whatever holds these."""
        if isinstance(value, Tensor):
            self.kept[what] = value.detach().clone()
        elif isinstance(value, dict):
            for key, inner in value.items():
                self.keep(f"{what} {key}", inner)
        elif isinstance(value, (list, tuple)) and any(
            isinstance(v, (Tensor, list, tuple)) for v in value
        ):
            for i, inner in enumerate(value):
                self.keep(f"{what} {i}", inner)
        else:
            self.kept[what] = value

    def outputs(self, what: str, outputs: Any) -> Any:
        """Keep what a forward pass returned."""
        for name in ("loss", "logits", "expert_aux_loss", "expert_routing"):
            value = getattr(outputs, name, None)
            if value is not None:
                self.keep(f"{what} {name}", value)
        return outputs

    def gradients(self, what: str) -> None:
        """Keep every gradient, None too, and the counts."""
        for name, (parameter, rows) in trainable(self.model, self.frozen).items():
            grad = parameter.grad
            self.keep(f"{what} grad {name}", None if grad is None else grad[rows])
        self.keep(f"{what} counts", counts(self.model))

    def step(self) -> None:
        """An optimizer step."""
        self.optimizer.step()
        self.optimizer.zero_grad()
