"""Moving experts to an updated base (arXiv:2410.10870): what was gained, and what was right before
and is not now.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

IGNORE = -100


@dataclass(frozen=True)
class BaseUpdate:
    """Two models on the same predictions: mean losses, and how many were right before and after.

    negative_flips were right before and are wrong after, positive_flips the other way round.
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
    """Both models on `batches` (input_ids, labels, attention_mask …).

    The mixture on its old base and on the updated one, for example
    `from_pretrained(folder)` and `from_pretrained(folder, base=updated, allow_base_mismatch=True)`.
    A causal model predicts the label that follows each token, a classifier each row's label.

    Raises:
        ValueError: a batch without labels, labels of another task, no label at all, or logits of
        two shapes.
    """
    losses, counts, total = (
        torch.zeros(2, dtype=torch.float64),
        torch.zeros(4, dtype=torch.int64),
        0,
    )
    modes = [(model, model.training) for model in (before, after)]
    try:
        for model, _ in modes:
            model.eval()
        for batch in batches:
            if batch.get("labels") is None:
                raise ValueError("A batch has no labels: give what the models should predict.")
            (logits, labels), (others, _) = _predictions(before, batch), _predictions(after, batch)
            if logits.shape != others.shape:
                raise ValueError(
                    f"The models' logits are {tuple(logits.shape)} and {tuple(others.shape)}, expected the same "
                    "shape: compare a model with its own update."
                )
            for side, values in enumerate((logits, others)):
                losses[side] += torch.nn.functional.cross_entropy(
                    values, labels, reduction="sum"
                ).item()
            was, now = logits.argmax(-1) == labels, others.argmax(-1) == labels
            counts += torch.stack(
                [was.sum(), now.sum(), (was & ~now).sum(), (~was & now).sum()]
            ).cpu()
            total += len(labels)
    finally:
        for model, training in modes:
            model.train(training)
    if not total:
        raise ValueError("There is no label other than -100 in the batches: nothing to compare.")
    return BaseUpdate(total, *(losses / total).tolist(), *counts.tolist())


def _predictions(model: Any, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Logits `[N, classes]` fp32 and labels `[N]` of all that is predicted."""
    inputs = {name: value.to(model.device) for name, value in batch.items() if name != "labels"}
    logits, labels = model(**inputs).logits.float(), batch["labels"].to(model.device)
    if logits.dim() == 3 and labels.dim() == 2:
        logits, labels = logits[:, :-1], labels[:, 1:]
    logits, labels = logits.reshape(-1, logits.shape[-1]), labels.reshape(-1)
    if len(logits) != len(labels):
        raise ValueError(
            f"{type(model).__name__} makes {len(logits)} predictions for {len(labels)} labels: give the labels that "
            "it is trained with."
        )
    counted = labels != IGNORE
    return logits[counted], labels[counted]
