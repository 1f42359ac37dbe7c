"""How well a model knows a task's answers: the loss on the target tokens, and the share of answers
that are right.

An answer of a closed set is right where its output is the likeliest among the options'; any other
one where each of its tokens is the likeliest, which is what greedy decoding gives.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from benchmarks.routing.bases import pad_id
from benchmarks.routing.tasks import Row
from moelora.training import PadRouting, Texts

IGNORE = -100


@dataclass(frozen=True)
class Score:
    """Sums over the rows of a task: nats and tokens of the targets, and how many answers were right
    of how many.
    """

    nats: float
    tokens: int
    right: int
    answers: int

    @property
    def loss(self) -> float:
        """Nats a token."""
        return self.nats / self.tokens

    @property
    def accuracy(self) -> float | None:
        """The share of right answers, or None where the task has none."""
        return self.right / self.answers if self.answers else None


class Sheet:
    """The rows of one task that are scored, as token ids, with the options of each.

    finals: for each row the options' last tokens, where all else of their outputs is the same; None
    where an option needs a forward pass of its own, or there is no closed set.
    """

    def __init__(
        self,
        rows: list[Row],
        options: tuple[str, ...],
        tokenizer: PreTrainedTokenizerBase,
        has_answers: bool,
    ):
        self.texts = Texts.of(rows, tokenizer)
        self.eos = tokenizer.eos_token_id
        self.pad = pad_id(tokenizer)
        self.options = options
        self.has_answers = has_answers
        self.gold = [options.index(row["answer"]) for row in rows] if options else []
        stems = [row["output"].removesuffix(row.get("answer", "")) for row in rows]
        self.variants = [
            Texts.of(
                [{**row, "output": stem + option} for row, stem in zip(rows, stems)], tokenizer
            )
            for option in options
        ]
        self.finals = self._finals()

    def _finals(self) -> list[list[int]] | None:
        found = []
        for i in range(len(self.texts) if self.variants else 0):
            targets = [self.target(texts[i]) for texts in self.variants]
            if len({tuple(t[:-1]) for t in targets}) > 1:
                return None
            found.append([t[-1] for t in targets])
        return found or None

    def target(self, item: dict[str, Tensor]) -> list[int]:
        """The target's token ids, without the end of the text."""
        ids = item["labels"][item["labels"] != IGNORE].tolist()
        return ids[:-1] if ids[-1] == self.eos else ids


@torch.no_grad()
def score(model: Any, sheet: Sheet, batch_size: int = 16) -> Score:
    """Score a model, in eval mode, on the rows of a sheet; it routes, or is forced, as it comes."""
    nats = 0.0
    tokens = 0
    right = 0
    for i, logits, labels in _targets(model, sheet.texts, sheet.pad, batch_size):
        nats += float(-logits.gather(1, labels[:, None]).sum())
        tokens += len(labels)
        if sheet.finals is not None:
            # The option is the last token before the end of the text.
            last = len(sheet.target(sheet.texts[i])) - 1
            right += int(logits[last, sheet.finals[i]].argmax()) == sheet.gold[i]
        elif sheet.has_answers and not sheet.options:
            right += bool((logits.argmax(1) == labels).all())
    if sheet.options and sheet.finals is None:
        right = _right_among_variants(model, sheet, batch_size)
    return Score(nats, tokens, right, len(sheet.texts) if sheet.has_answers else 0)


def _right_among_variants(model: Any, sheet: Sheet, batch_size: int) -> int:
    """How many rows give their own option the highest log-likelihood, each option in a row of its
    own.
    """
    found = torch.zeros(len(sheet.texts), len(sheet.options))
    for option, texts in enumerate(sheet.variants):
        for i, logits, labels in _targets(model, texts, sheet.pad, batch_size):
            count = len(sheet.target(texts[i]))
            found[i, option] = logits[:count].gather(1, labels[:count, None]).sum()
    return int((found.argmax(1) == torch.tensor(sheet.gold)).sum())


def _targets(
    model: Any, texts: Texts, pad: int, batch_size: int
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """For each row its number, the log-probabilities `[n, V]` at its target tokens, and those
    tokens `[n]`.
    """
    collate = TailLogits(PadRouting(pad_token_id=pad), model)
    for numbers in by_length(texts, batch_size):
        batch = collate([texts[i] for i in numbers])
        labels = batch.pop("labels")
        batch.pop("expert_targets", None)
        logits = model(**batch).logits
        logits = logits[:, :-1]
        labels = labels[:, 1:]
        for row, i in enumerate(numbers):
            there = labels[row] != IGNORE
            yield i, logits[row, there].float().log_softmax(-1), labels[row, there]


def by_length(texts: Texts, batch_size: int) -> Iterator[list[int]]:
    """The numbers of all texts in batches of like lengths, which spares padding."""
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]["input_ids"]))
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]


class TailLogits:
    """A collator that pads by another and asks for no logits before a batch's first target.

    The language modelling head is a fifth of SmolLM2-135M's work, and most positions are prompt.
    Bases without `logits_to_keep` get whole labels, models whose routers read no prompts no
    router_mask. Any side of padding will do, though the left one spares the most logits.
    """

    def __init__(self, collate: Any, model: Any):
        names = _parameters(model)
        self.collate = collate
        self.keeps = "logits_to_keep" in names
        self.routes = "router_mask" in names and model.moelora_config.reads_prompts

    def __call__(self, rows: list[dict[str, Tensor]]) -> dict[str, Any]:
        batch = dict(self.collate(rows))
        if not self.routes:
            batch.pop("router_mask", None)
        if self.keeps:
            targets = (batch["labels"] != IGNORE).any(0).nonzero()
            # One more, whose logits predict the first target.
            kept = batch["labels"].shape[1] - int(targets[0]) + 1
            batch |= {"labels": batch["labels"][:, -kept:], "logits_to_keep": kept}
        return batch


def _parameters(model: Any) -> set[str]:
    """The names of the arguments of a model's forward, of the base's inside PEFT's."""
    inside = model.get_base_model() if hasattr(model, "get_base_model") else model
    return set(inspect.signature(inside.forward).parameters)
