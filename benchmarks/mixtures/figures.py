"""Records put together: the same comparison's runs, and the means of a model over seeds."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from benchmarks.mixtures import existing, sequential
from benchmarks.mixtures.evaluation import mean
from benchmarks.mixtures.store import Record

ORACLES = (existing.ORACLE, sequential.ORACLE)
# What is the same for all models of one comparison.
SHARED = ("part", "case", "base", "dtype", "tasks", "data", "steps", "batch")


@dataclass(frozen=True)
class Spread:
    """One figure over seeds."""

    mean: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Of one value a seed."""
        return cls(sum(values) / len(values), min(values), max(values))

    def text(self) -> str:
        """The mean, and the least and greatest where there are several."""
        if self.low == self.high:
            return f"{self.mean:.4f}"
        return f"{self.mean:.4f} ({self.low:.4f}-{self.high:.4f})"


@dataclass(frozen=True)
class Figures:
    """One model in one comparison.

    by_seed: the loss of each seed that was run.
    lost: how much more loss the worst task has than right after it was learned, as a share.
    """

    model: str
    single: bool
    rate: float
    parameters: int
    loss: Spread
    by_seed: dict[int, float]
    accuracy: Spread | None
    lost: Spread | None
    by_task: dict[str, float]


@dataclass(frozen=True)
class Group:
    """The test runs of one comparison."""

    settings: dict[str, Any]
    records: list[Record]

    @property
    def part(self) -> str:
        """Which of the four parts."""
        return self.settings["part"]

    @property
    def case(self) -> str:
        """Which case within the part, or nothing."""
        return self.settings["case"]

    @cached_property
    def singles(self) -> list[Figures]:
        """The single LoRAs."""
        return [own for own in figures(self) if own.single]

    @cached_property
    def mixtures(self) -> list[Figures]:
        """All else."""
        return [own for own in figures(self) if not own.single]

    def over_best_single(self, own: Figures) -> float:
        """A model's loss over that of the best single LoRA of those with the most seeds, on the
        seeds that both have, since one seed's rows and start are harder than another's; NaN
        without any.
        """
        best = best_of(self.singles)
        common = set() if best is None else own.by_seed.keys() & best.by_seed.keys()
        if best is None or not common:
            return float("nan")
        return sum(own.by_seed[s] for s in common) / sum(best.by_seed[s] for s in common)

    @property
    def oracle(self) -> float:
        """The mean loss of each task by its own adapter; NaN without it."""
        found = [own.loss.mean for own in figures(self) if own.model in ORACLES]
        return found[0] if found else float("nan")

    def equal_to(self, mixture: str) -> Figures | None:
        """The single LoRA with a mixture's trainable parameters, if it was measured."""
        ending = f"parameters of {mixture}"
        return next((own for own in self.singles if own.model.endswith(ending)), None)


def best_of(models: Sequence[Figures]) -> Figures | None:
    """The model of the lowest loss among those with the most seeds; None of none."""
    return min(models, key=lambda own: (-len(own.by_seed), own.loss.mean), default=None)


def groups(records: Sequence[Record]) -> list[Group]:
    """The comparisons among all test runs, in the order in which they began."""
    found: dict[str, Group] = {}
    for record in records:
        own = record["settings"]
        if own["evaluated"] != "test":
            continue
        settings = {name: own.get(name, "") for name in SHARED}
        key = json.dumps(settings, sort_keys=True)
        found.setdefault(key, Group(settings, [])).records.append(record)
    return list(found.values())


def figures(group: Group) -> list[Figures]:
    """Each model's figures, single LoRAs by size and then the rest by loss; a model that was run
    with several settings, such as learning rates, is as many models.
    """
    runs: dict[str, list[Record]] = {}
    for record in group.records:
        settings = {**record["settings"], "seed": None}
        runs.setdefault(json.dumps(settings, sort_keys=True), []).append(record)
    learned = {
        record["settings"]["seed"]: record["loss"]
        for record in group.records
        if record["model"] == sequential.ORACLE
    }
    return sorted((_figures(own, learned) for own in runs.values()), key=_place)


def _place(own: Figures) -> tuple[bool, float]:
    return not own.single, own.parameters if own.single else own.loss.mean


def _figures(records: list[Record], oracle: dict[int, dict[str, float]]) -> Figures:
    # An adapter is what it was when it was learned; one LoRA that is trained on tells itself.
    first = records[0]
    tasks = list(first["loss"])
    accuracy = [mean(r["accuracy"]) for r in records if r.get("accuracy")]
    known = [(r["loss"], r.get("learned") or oracle.get(r["settings"]["seed"])) for r in records]
    lost = [
        max(loss[task] / learned[task] - 1 for task in loss) for loss, learned in known if learned
    ]
    return Figures(
        model=first["model"],
        single=bool(first["settings"].get("single")),
        rate=first["settings"]["rate"],
        parameters=first.get("parameters", 0),
        loss=Spread.of([mean(r["loss"]) for r in records]),
        by_seed={r["settings"]["seed"]: mean(r["loss"]) for r in records},
        accuracy=Spread.of(accuracy) if accuracy else None,
        lost=Spread.of(lost) if lost else None,
        by_task={task: sum(r["loss"][task] for r in records) / len(records) for task in tasks},
    )
