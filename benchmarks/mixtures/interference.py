"""Part d: from how many conflicting tasks on does a LoRA of equal size fall behind?"""

from __future__ import annotations

from dataclasses import replace

from benchmarks.mixtures.conflicts import conflicting, limit
from benchmarks.mixtures.data import Split
from benchmarks.mixtures.models import SEQUENCE, Candidate, equal_lora, mixture
from benchmarks.mixtures.setup import Setup, Trial, compared

PART = "interference"
RANK = 4
# So many rows in all are enough to choose a rate on, and to measure.
VALIDATION = 32
TEST = 128


def models(setup: Setup, count: int) -> list[Candidate]:
    """The models for so many conflicting tasks: an expert a task, experts by token, and LoRAs."""
    known = mixture("an expert a task, r=4", count, RANK, 1, **SEQUENCE)
    token = mixture("8 x r=4, top 2", 8, RANK, 2)
    return [known, token, equal_lora(setup.base, known), equal_lora(setup.base, token)]


def lanes(setup: Setup) -> list[str]:
    """Cases by number of tasks and model."""
    found = []
    for case in setup.sizes.cases:
        for count in setup.sizes.interference_tasks:
            if count <= limit(setup.splits, case):
                made = setup.wanted(models(setup, count))
                found += [f"{case}|{count}|{name}" for name in dict.fromkeys(m.name for m in made)]
    return found


def run(setup: Setup, lane: str) -> None:
    """One model in one case."""
    case, count, name = lane.split("|")
    (made,) = {m.name: m for m in models(setup, int(count)) if m.name == name}.values()
    compared(setup, trial(setup, case, int(count)), made)


def trial(setup: Setup, case: str, count: int) -> Trial:
    """The rows of a case; a part of its validation and test rows, alike for every count."""
    splits = tuple(
        _fewer(split, VALIDATION // count, TEST // count)
        for split in conflicting(setup.splits, case, count)
    )
    sizes = setup.sizes
    steps = (sizes.interference_steps, sizes.interference_batch)
    return Trial(PART, splits, *steps, case=f"{case}, {count} tasks")


def _fewer(split: Split, validation: int, test: int) -> Split:
    return replace(
        split, validation=split.validation[: max(1, validation)], test=split.test[: max(1, test)]
    )
