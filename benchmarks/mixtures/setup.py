"""What every part of the benchmark is told, and one run: a model trained at a rate and measured."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from benchmarks.mixtures.data import Split, batches, fingerprint
from benchmarks.mixtures.evaluation import evaluate, mean
from benchmarks.mixtures.models import Candidate, build
from benchmarks.mixtures.rates import search
from benchmarks.mixtures.store import Record, Store, key_of
from benchmarks.mixtures.training import count_trainable, fit
from benchmarks.routing import bases


@dataclass(frozen=True)
class Sizes:
    """How much is learned: steps of `batch` rows.

    task_steps: of each task's own adapter, and of the one LoRA that learns task after task.
    interference_steps: where tasks conflict, whose rows are short. cases: of `conflicts.CASES`.
    interference_tasks: how many conflicting tasks are tried.
    """

    steps: int = 100
    batch: int = 4
    validation: int = 20
    task_steps: int = 25
    interference_steps: int = 60
    interference_batch: int = 4
    interference_tasks: tuple[int, ...] = (2, 4, 8)
    cases: tuple[str, ...] = ("domain", "word")


@dataclass(frozen=True)
class Setup:
    """One start of the benchmark.

    base: a folder or id. dtype: what the frozen base is loaded in; experts are in fp32.
    work: a folder for adapters and half-done things. rates: to choose among, in place of a search.
    """

    base: str
    splits: tuple[Split, ...]
    seeds: int
    sizes: Sizes
    store: Store
    work: Path
    dtype: str = "bfloat16"
    rates: tuple[float, ...] | None = None
    only_models: tuple[str, ...] | None = None
    tokenizer: PreTrainedTokenizerBase = field(init=False, compare=False)

    def __post_init__(self):
        object.__setattr__(self, "tokenizer", bases.load_tokenizer(self.base))

    @property
    def pad(self) -> int:
        """The token that pads."""
        return bases.pad_id(self.tokenizer)

    def wanted(self, candidates: Sequence[Candidate]) -> list[Candidate]:
        """Those that were asked for by name; all by default."""
        names = self.only_models
        return [c for c in candidates if names is None or any(n in c.name for n in names)]

    def common(self, splits: Sequence[Split]) -> dict[str, Any]:
        """The settings that all runs on these rows have."""
        return {
            "base": Path(self.base).name,
            "dtype": self.dtype,
            "tasks": [split.name for split in splits],
            "data": fingerprint(splits),
        }


@dataclass(frozen=True)
class Trial:
    """A part's rows and steps: what is common to the models that are compared there.

    case: says within the part which rows these are.
    """

    part: str
    splits: tuple[Split, ...]
    steps: int
    batch: int
    case: str = ""

    def experts(self, made: Candidate) -> dict[str, int]:
        """By task the expert that its rows name, one after another."""
        count = int(made.fields.get("num_experts", 1))
        return {split.name: i % count for i, split in enumerate(self.splits)}


def settings_of(setup: Setup, trial: Trial, made: Candidate, rate: float, seed: int) -> dict:
    """All that decides what a training gives."""
    own = {"part": trial.part, "case": trial.case, "steps": trial.steps, "batch": trial.batch}
    return {**setup.common(trial.splits), **own, **made.settings(), "rate": rate, "seed": seed}


def trained(
    setup: Setup, trial: Trial, made: Candidate, rate: float, seed: int
) -> tuple[Any, dict[str, Any]]:
    """The model, trained now or, where the work folder has it, before; and what that took."""
    model = build(made, setup.base, seed, setup.dtype)
    path = _parameters(setup, settings_of(setup, trial, made, rate, seed))
    own = _state(model)
    facts: dict[str, Any] = {"model": made.name, "parameters": count_trainable(model)}
    if path.is_file():
        for name, tensor in load_file(path).items():
            own[name].copy_(tensor)
        return model.eval(), facts
    labels = trial.experts(made) if made.labels else None
    sizes = (trial.steps, trial.batch, seed)
    texts = batches(trial.splits, setup.tokenizer, *sizes, labels)
    start = time.process_time()
    folder = setup.work / path.stem
    fit(model, texts, setup.pad, trial.batch, rate, folder, made.router_rate)
    facts["training_seconds"] = round(time.process_time() - start, 1)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in own.items()}, path)
    return model, facts


def measured(
    setup: Setup, trial: Trial, made: Candidate, rate: float, seed: int, part: str
) -> Record:
    """One training and its figures on the "validation" or "test" rows."""
    settings = settings_of(setup, trial, made, rate, seed)

    def run() -> Mapping[str, Any]:
        model, facts = trained(setup, trial, made, rate, seed)
        sheets = {split.name: split.sheet(part, setup.tokenizer) for split in trial.splits}
        return facts | evaluate(model, sheets)

    record = setup.store.once({**settings, "evaluated": part}, run)
    if part == "test":
        # Only the sweep's models are asked for twice.
        _parameters(setup, settings).unlink(missing_ok=True)
    return record


def best_rate(setup: Setup, trial: Trial, made: Candidate) -> float:
    """The learning rate with the lowest mean loss on the validation rows, by seed 0."""
    tried: list[float] = []

    def loss(rate: float) -> float:
        tried.append(rate)
        return mean(measured(setup, trial, made, rate, 0, "validation")["loss"])

    best = search(loss, setup.rates)
    for rate in tried:
        if rate != best:
            settings = settings_of(setup, trial, made, rate, 0)
            _parameters(setup, settings).unlink(missing_ok=True)
    return best


def compared(setup: Setup, trial: Trial, made: Candidate) -> None:
    """One model's lane: its best learning rate, and with that every seed on the test rows."""
    rate = best_rate(setup, trial, made)
    for seed in range(setup.seeds):
        report(measured(setup, trial, made, rate, seed, "test"))


def report(record: Record) -> None:
    """A line of progress."""
    own = record["settings"]
    words = (own["part"], own.get("case"), f"{record['model']}, seed {own['seed']}")
    loss = mean(record["loss"])
    print(f"{' · '.join(filter(None, words))}: rate {own['rate']:g}, loss {loss:.4f}", flush=True)


def _state(model: Any) -> dict[str, Tensor]:
    """What training changes: the trained parameters, and what a mixture counts."""
    trained = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
    if not hasattr(model, "moelora"):
        return trained
    return trained | {f"moelora.{n}": b for n, b in model.moelora.named_buffers()}


def _parameters(setup: Setup, settings: Mapping[str, Any]) -> Path:
    return setup.work / "trained" / f"{key_of(settings)}.safetensors"
