"""Tasks that conflict: the same inputs under several conventions, each with labels of its own.

A convention is a permutation of the labels. "word": a word before the text names it, and the text's
kind (which of the tasks it is from) is what is labelled. "domain": the kind of the text is the
convention, and a colour named after it is what is labelled; nothing else tells them apart.
"formats": the questions of one task, answered in the form that a word before them names.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Sequence

from benchmarks.mixtures.data import Split
from benchmarks.routing.tasks import Row

CASES = ("word", "domain", "formats")
LABELS = ("north", "south", "east", "west", "spring", "summer", "autumn", "winter")
COLOURS = ("red", "green", "blue", "white")
# One token each for most tokenizers, and none says anything of a text.
WORDS = (
    *("apple", "river", "stone", "cloud", "horse", "table", "piano", "glass"),
    *("tiger", "bread", "ocean", "paper", "metal", "train", "queen", "salad"),
)
FORMATS = (
    "the correct answer is {}",
    "{}",
    "Answer: {}!",
    '{{"answer": "{}"}}',
    "<answer>{}</answer>",
    "{} is what I would say",
    "It must be {}, I think",
    "[{}] final",
)
SNIPPET_WORDS = 20


def conflicting(splits: Sequence[Split], case: str, count: int) -> tuple[Split, ...]:
    """`count` tasks that conflict, made of the rows of `splits`; every one has all their rows.

    Raises:
        ValueError: more of them than the case has.
    """
    most = limit(splits, case)
    if not 2 <= count <= most:
        raise ValueError(f"case {case!r} has 2 to {most} conflicting tasks, not {count}.")
    if case == "formats":
        return tuple(_format(splits, i) for i in range(count))
    if case == "domain":
        return tuple(_domain(split, i) for i, split in enumerate(splits[:count]))
    return tuple(_convention(splits, i) for i in range(count))


def limit(splits: Sequence[Split], case: str) -> int:
    """How many conflicting tasks a case has."""
    conventions = math.factorial(len(splits[: len(LABELS)]))
    words = min(len(WORDS), conventions)
    return {"word": words, "formats": len(FORMATS), "domain": len(splits)}[case]


def permutation(labels: Sequence[str], number: int) -> list[str]:
    """The labels in an order of their own: first the rotations, which agree nowhere.

    Raises:
        ValueError: more orders than there are.
    """
    count = len(labels)
    if number < count:
        return [*labels[number:], *labels[:number]]
    rotations = {tuple(permutation(labels, i)) for i in range(count)}
    others = [p for p in itertools.permutations(labels) if p not in rotations]
    random.Random(count).shuffle(others)
    if number - count >= len(others):
        raise ValueError(f"{count} labels have {math.factorial(count)} orders, not {number + 1}.")
    return list(others[number - count])


def snippet(text: str, words: int = SNIPPET_WORDS) -> str:
    """The first words of a text, on one line."""
    return " ".join(text.split()[:words])


def _convention(splits: Sequence[Split], number: int) -> Split:
    kinds = splits[: len(LABELS)]
    labels = permutation(LABELS[: len(kinds)], number)
    word = WORDS[number]

    def row(split: Split, own: Row) -> Row:
        label = labels[splits.index(split)]
        prompt = f"{word}: {snippet(own['instruction'])}"
        return {"instruction": prompt, "output": label, "answer": label}

    return _mixed(f"{word} convention", kinds, row, labels)


def _domain(split: Split, number: int) -> Split:
    labels = permutation(LABELS[: len(COLOURS)], number)

    def made(rows: Sequence[Row]) -> tuple[Row, ...]:
        found = []
        for i, own in enumerate(rows):
            label = labels[i % len(COLOURS)]
            colour = COLOURS[i % len(COLOURS)]
            prompt = f"{snippet(own['instruction'])}\n{colour}:"
            found.append({"instruction": prompt, "output": label, "answer": label})
        return tuple(found)

    parts = (made(split.train), made(split.validation), made(split.test))
    return Split(f"colours in {split.name}", *parts, tuple(sorted(labels)), True)


def _format(splits: Sequence[Split], number: int) -> Split:
    word = WORDS[number]

    def row(split: Split, own: Row) -> Row:
        answer = own.get("answer") or " ".join(own["output"].split()[:3])
        prompt = f"{word}: {snippet(own['instruction'])}"
        return {"instruction": prompt, "output": FORMATS[number].format(answer)}

    return _mixed(f"{word} format", splits, row, None)


def _mixed(name: str, splits: Sequence[Split], row, labels: Sequence[str] | None) -> Split:
    """The rows of all splits, one of each in turn, made anew by `row`."""

    def made(part: str) -> tuple[Row, ...]:
        columns = [[row(split, own) for own in getattr(split, part)] for split in splits]
        turns = itertools.zip_longest(*columns)
        return tuple(own for turn in turns for own in turn if own is not None)

    options = tuple(sorted(labels)) if labels else ()
    return Split(name, made("train"), made("validation"), made("test"), options, bool(labels))
