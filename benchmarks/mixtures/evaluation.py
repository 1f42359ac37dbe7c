"""A model's answers on every task: nats a token, and the share that is right."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from benchmarks.routing.scoring import Score, Sheet, score

BATCH = 16


def evaluate(model: Any, sheets: Mapping[str, Sheet]) -> dict[str, Any]:
    """The loss and accuracy by task, as a record holds them, and the processor's seconds."""
    start = time.process_time()
    model.eval()
    scores = {name: score(model, sheet, BATCH) for name, sheet in sheets.items()}
    return found(scores) | {"evaluation_seconds": round(time.process_time() - start, 1)}


def found(scores: Mapping[str, Score]) -> dict[str, Any]:
    """Scores by task as a record holds them."""
    made: dict[str, Any] = {"loss": {name: own.loss for name, own in scores.items()}}
    accuracy = {name: own.accuracy for name, own in scores.items()}
    if all(share is not None for share in accuracy.values()):
        made["accuracy"] = accuracy
    return made


def mean(by_task: Mapping[str, float]) -> float:
    """The mean over tasks, each counting alike."""
    return sum(by_task.values()) / len(by_task)
