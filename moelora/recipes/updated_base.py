"""Experts on an updated base (arXiv:2410.10870): what is right now, and what is wrong now."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..core.model import evaluating
from ..training.evaluation import predictions, summed_loss


@dataclass(frozen=True)
class BaseUpdate:
    """Two models on the same predictions.

    Args:
        predictions: how many there are.
        loss_before, loss_after: the mean losses.
        right_before, right_after: how many predictions are the label.
        negative_flips: how many were right before and are wrong after.
        positive_flips: how many were wrong before and are right after.
    """

    predictions: int
    loss_before: float
    loss_after: float
    right_before: int
    right_after: int
    negative_flips: int
    positive_flips: int

    @property
    def negative_flip_rate(self) -> float:
        """Negative flips over all predictions."""
        return self.negative_flips / self.predictions

    def table(self) -> str:
        """The figures as a Markdown table."""
        total = self.predictions
        rows = [
            ("", "before", "after"),
            ("---", "---:", "---:"),
            ("loss", f"{self.loss_before:.4f}", f"{self.loss_after:.4f}"),
            ("right", f"{self.right_before / total:.1%}", f"{self.right_after / total:.1%}"),
            ("negative flips", "", f"{self.negative_flips} ({self.negative_flip_rate:.2%})"),
            ("positive flips", "", f"{self.positive_flips} ({self.positive_flips / total:.2%})"),
        ]
        return "\n".join("| " + " | ".join(row) + " |" for row in rows)


@torch.no_grad()
def compare_bases(before: Any, after: Any, batches: Iterable[Mapping[str, Tensor]]) -> BaseUpdate:
    """Compare a mixture on its old base with the same experts on the updated one.

    The latter is for example `from_pretrained(folder, base=updated, allow_base_mismatch=True)`. A
    causal model predicts the label that follows each token, a classifier each row's label.

    Args:
        before: a mixture, or a plain model.
        after: a model with predictions of the same shape.
        batches: input_ids, labels, attention_mask …

    Raises:
        ValueError: a batch without labels, labels of another task, no label at all, or logits of
            two shapes.
    """
    losses = [0.0, 0.0]
    right: list[Tensor] = []
    with evaluating(before), evaluating(after):
        for batch in batches:
            sides = [predictions(model, batch) for model in (before, after)]
            (logits, _), (others, _) = sides
            if logits.shape != others.shape:
                raise ValueError(
                    f"The models' logits are {tuple(logits.shape)} and {tuple(others.shape)}, "
                    "expected the same shape: compare a model with its own update."
                )
            losses = [loss + summed_loss(*side) for loss, side in zip(losses, sides)]
            right.append(torch.stack([(x.argmax(-1).cpu() == own.cpu()) for x, own in sides]))
    was, now = torch.cat([torch.empty(2, 0, dtype=torch.bool), *right], dim=1)
    if not len(was):
        raise ValueError("There is no label other than -100 in the batches: nothing to compare.")
    counts = [int(one.sum()) for one in (was, now, was & ~now, ~was & now)]
    return BaseUpdate(len(was), *(loss / len(was) for loss in losses), *counts)
