"""Experts on an updated base (arXiv:2410.10870): what is right now, and what is wrong now."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..training.evaluation import scored


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
    batches = list(batches)
    loss_before, was, classes = scored(before, batches)
    loss_after, now, others = scored(after, batches)
    if (len(was), classes) != (len(now), others):
        raise ValueError(
            f"The models' logits are {(len(was), classes)} and {(len(now), others)}, expected the "
            "same shape: compare a model with its own update."
        )
    counts = [int(one.sum()) for one in (was, now, was & ~now, ~was & now)]
    return BaseUpdate(len(was), loss_before, loss_after, *counts)
