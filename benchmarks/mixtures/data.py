"""The tasks cut into training, validation and test rows, and the order in which they are learned.

The order depends on the seed and the sizes alone, so every model sees the same rows in the same
batches.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from benchmarks.routing.scoring import Sheet
from benchmarks.routing.tasks import Row, Task, drawn
from moelora.training import Texts

# Within so many batches rows are put together by length: less padding, tasks still mixed.
WINDOW = 4


@dataclass(frozen=True)
class Split:
    """One task's rows: to learn from, to choose learning rates on, and to be measured on."""

    name: str
    train: tuple[Row, ...]
    validation: tuple[Row, ...]
    test: tuple[Row, ...]
    options: tuple[str, ...]
    has_answers: bool

    @classmethod
    def of(cls, task: Task, validation: int, test: int | None = None) -> Split:
        """Cut `validation` rows from a task's training part, the same for every seed.

        test: how many test rows; None for all.
        """
        if not 0 < validation < len(task.train):
            raise ValueError(
                f"{task.name}: {validation} validation rows of {len(task.train)} training rows; "
                "expected one at least, and some left to learn from."
            )
        order = drawn(task.train, len(task.train), 0, f"{task.name}, split")
        scored = drawn(task.test, test or len(task.test), 0, f"{task.name}, scored")
        return cls(
            task.name,
            train=tuple(order[validation:]),
            validation=tuple(order[:validation]),
            test=tuple(scored),
            options=task.options,
            has_answers=task.has_answers,
        )

    def sheet(self, part: str, tokenizer: PreTrainedTokenizerBase) -> Sheet:
        """The rows of "validation" or "test" as they are scored."""
        return Sheet(list(getattr(self, part)), self.options, tokenizer, self.has_answers)


def fingerprint(splits: Sequence[Split]) -> str:
    """A short hash of all rows: figures on other data are other figures."""
    content = [[s.name, s.train, s.validation, s.test] for s in splits]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:12]


def batches(
    splits: Sequence[Split],
    tokenizer: PreTrainedTokenizerBase,
    steps: int,
    batch: int,
    seed: int,
    experts: Mapping[str, int] | None = None,
) -> Texts:
    """`steps · batch` training rows in their order, as many of each task as of the others.

    experts: by task the expert_targets of its rows.
    """
    share = -(-steps * batch // len(splits))
    parts = [_labelled(s, _rows(s, share, seed), tokenizer, experts) for s in splits]
    texts = Texts.joined(parts)
    order = list(range(len(texts)))
    generator = random.Random(seed)
    generator.shuffle(order)
    return texts.subset(_by_window(texts, order[: steps * batch], batch, generator))


def _rows(split: Split, count: int, seed: int) -> list[Row]:
    """`count` rows in an order that the seed draws, epoch after epoch where there are fewer."""
    rows: list[Row] = []
    epoch = 0
    while len(rows) < count:
        rows += drawn(split.train, count - len(rows), seed, f"{split.name}, epoch {epoch}")
        epoch += 1
    return rows


def _labelled(
    split: Split,
    rows: list[Row],
    tokenizer: PreTrainedTokenizerBase,
    experts: Mapping[str, int] | None,
) -> Texts:
    texts = Texts.of(rows, tokenizer)
    return texts if experts is None else texts.labelled(experts[split.name])


def _by_window(texts: Texts, order: list[int], batch: int, generator: random.Random) -> list[int]:
    """The same rows, those of each window of batches by length, its batches in a random order."""
    found: list[int] = []
    for start in range(0, len(order), batch * WINDOW):
        window = sorted(
            order[start : start + batch * WINDOW], key=lambda i: len(texts[i]["input_ids"])
        )
        cut = [window[i : i + batch] for i in range(0, len(window), batch)]
        generator.shuffle(cut)
        found += [i for rows in cut for i in rows]
    return found
