"""How much of everything is measured, and what every part of the benchmark is told."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from benchmarks.routing.scoring import Sheet
from benchmarks.routing.tasks import Row, Task, drawn
from moelora.training import Texts


@dataclass(frozen=True)
class Sizes:
    """Counts of texts are for each task; a training step has `batch` texts.

    selector_seeds: for how many of the seeds a selector is trained, which takes as long as many
    adapters.
    """

    expert_texts: int = 24
    batch: int = 2
    gate_texts: int = 100
    scored_texts: int = 18
    token_gate_steps: int = 24
    prototype_texts: int = 8
    deep_texts: int = 50
    selector_batch: int = 2
    selector_samples: int = 25
    selector_seeds: int = 1
    latency_prompts: int = 2
    latency_rounds: int = 5
    rank: int = 8
    router_layer: int = 4

    @classmethod
    def quick(cls) -> Sizes:
        """Enough to see that it runs, and roughly what comes out."""
        return cls(
            expert_texts=8,
            gate_texts=20,
            scored_texts=6,
            token_gate_steps=4,
            prototype_texts=4,
            deep_texts=10,
            selector_samples=5,
            latency_prompts=1,
            latency_rounds=3,
            router_layer=1,
        )


@dataclass(frozen=True)
class Settings:
    """One run: the base's folder or id, the tasks, more of them that are hard to tell apart, and
    texts of no task.

    outside: prompts by source for the choice of no expert; outside_train names those that it learns
    from.
    folder: where adapters are put.
    """

    base: str
    tasks: tuple[Task, ...]
    harder: tuple[Task, ...]
    outside: tuple[Task, ...]
    outside_train: tuple[str, ...]
    seeds: int
    sizes: Sizes
    folder: Path

    @property
    def names(self) -> list[str]:
        """The tasks' names, which are the experts'."""
        return [task.name for task in self.tasks]

    @property
    def all_tasks(self) -> tuple[Task, ...]:
        """The tasks and the harder ones."""
        return self.tasks + self.harder

    def adapter(self, seed: int, name: str) -> Path:
        """The folder of the adapter that a seed's training made of a task."""
        return self.folder / f"seed{seed}" / name

    def learned(self, task: Task, seed: int) -> list[Row]:
        """The rows that a seed's gates and selector learn from; its experts learn from the first of
        them.
        """
        return drawn(task.train, self.sizes.gate_texts, seed, f"{task.name}, train")

    def gate_texts(
        self, tasks: Sequence[Task], seed: int, tokenizer: PreTrainedTokenizerBase
    ) -> dict[str, Texts]:
        """By task the texts of `learned`."""
        return {task.name: Texts.of(self.learned(task, seed), tokenizer) for task in tasks}

    def expert_texts(self, task: Task, seed: int, tokenizer: PreTrainedTokenizerBase) -> Texts:
        """The texts that a task's adapter learns from."""
        return Texts.of(self.learned(task, seed)[: self.sizes.expert_texts], tokenizer)

    def sheet(self, task: Task, seed: int, tokenizer: PreTrainedTokenizerBase) -> Sheet:
        """The rows of a task that every candidate is scored on."""
        rows = drawn(task.test, self.sizes.scored_texts, seed, f"{task.name}, test")
        return Sheet(rows, task.options, tokenizer, task.has_answers)
