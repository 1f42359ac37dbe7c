"""The demo's tasks, each with an answer form of its own, and how a model is measured on them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from moelora.training import PadRouting, Texts

FOLDER = Path(__file__).parent / "data"
# In the order in which the tasks arrive. Who asks for one form cannot use another.
FORMS = {
    "boolq": '{{"answer": {}}}',
    "winogrande": "<answer>{}</answer>",
    "math_svamp": "It is {}.",
}
EVALUATION_BATCH = 8


@dataclass(frozen=True)
class ArrivingTask:
    """One task's texts, to learn from and to be measured on."""

    name: str
    train: Texts
    test: Texts
    rows: list[dict[str, str]]


@dataclass(frozen=True)
class Score:
    """What a model is worth on one task.

    loss: nats a token of the answers. right: the share of rows whose whole answer the model
    prefers, token for token.
    """

    loss: float
    right: float


def load_tasks(tokenizer: PreTrainedTokenizerBase, train: int, test: int) -> list[ArrivingTask]:
    """The tasks, with so many rows to learn from and to be measured on."""
    tasks = []
    for name in FORMS:
        rows = {part: _rows(name, part) for part in ("train", "test")}
        tasks.append(
            ArrivingTask(
                name,
                Texts.of(_repeated(rows["train"], train), tokenizer),
                Texts.of(rows["test"][:test], tokenizer),
                rows["test"],
            )
        )
    return tasks


@torch.no_grad()
def measure(model: Any, texts: Texts, collator: PadRouting, done: Callable[[int], None]) -> Score:
    """The score of a model on a task's texts; `done` is told of so many rows at a time."""
    model.eval()
    loss = right = 0.0
    for batch in DataLoader(texts, EVALUATION_BATCH, collate_fn=collator):  # type: ignore[arg-type]
        # The logits at one place are for the token at the next.
        labels = batch.pop("labels")[:, 1:]
        logits = model(**batch).logits[:, :-1]
        answer = labels != -100
        losses = cross_entropy(logits.transpose(1, 2), labels, reduction="none")
        loss += float((losses.sum(1) / answer.sum(1)).sum())
        right += float(((logits.argmax(-1) == labels) | ~answer).all(1).sum())
        done(len(labels))
    return Score(loss / len(texts), right / len(texts))


def mean_score(scores: Mapping[str, Score]) -> Score:
    """The mean over tasks."""
    values = list(scores.values())
    return Score(
        sum(s.loss for s in values) / len(values), sum(s.right for s in values) / len(values)
    )


def _rows(name: str, part: str) -> list[dict[str, str]]:
    lines = (FOLDER / f"{name}.{part}.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    return [
        {"prompt": r["instruction"], "completion": FORMS[name].format(r["answer"])} for r in rows
    ]


def _repeated(rows: Sequence[dict[str, str]], count: int) -> list[dict[str, str]]:
    """`count` rows, from the first again where there are fewer."""
    return [rows[i % len(rows)] for i in range(count)]
