"""Part c: adapters that exist already, of different ranks and targets, made one model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.mixtures import adapters
from benchmarks.mixtures.adapters import composed
from benchmarks.mixtures.data import Split
from benchmarks.mixtures.evaluation import evaluate, mean
from benchmarks.mixtures.gating import decided, gate_texts, prompts
from benchmarks.mixtures.models import SCALE, Candidate
from benchmarks.mixtures.sequential import TIES_DENSITY, merged, oracle, sheets
from benchmarks.mixtures.setup import Setup, report
from benchmarks.routing.tasks import Task
from moelora.training import train_gate
from moelora.training.router_init import initialise

PART = "existing"
BARE = "prompts without their template's words"
# One after another, and again from the beginning where there are more tasks.
KINDS: tuple[tuple[int, Any], ...] = (
    (8, "all-linear"),
    (4, ["q_proj", "v_proj"]),
    (16, ["gate_proj", "up_proj", "down_proj"]),
    (32, ["q_proj", "k_proj", "v_proj", "o_proj"]),
    (2, "all-linear"),
    (16, ["q_proj", "v_proj", "down_proj"]),
)
ORACLE = "each task by its own adapter (oracle)"
BEST = "the best single adapter"
UNIFORM = "adapters merged evenly"
TIES = f"adapters merged by TIES, density {TIES_DENSITY}"
ARROW = "Arrow (token, top 4)"
PROTOTYPES = "ours, untrained: prototypes of 8 prompts"
GATED = "ours, gate trained"
PROBABILITY = "ours, gate trained, weight = probability"
TOP_2 = "ours, gate trained, top 2"


def phases(setup: Setup) -> list[list[str]]:
    """The learning rate, which is part b's, and then the seeds."""
    seeds = [str(seed) for seed in range(setup.seeds)]
    return [["rate"], [*seeds, *(f"bare {seed}" for seed in seeds)]]


def run(setup: Setup, lane: str) -> None:
    """One lane of `phases`."""
    rate = adapters.best_rate(setup)
    if lane == "rate":
        return
    seed = int(lane.split()[-1])
    made = zip(setup.splits, kinds(len(setup.splits)), strict=True)
    folders = {s.name: adapters.adapter(setup, s, own, rate, seed) for s, own in made}
    if lane.startswith("bare"):
        setup = replace(setup, splits=tuple(without_template(s) for s in setup.splits))
        methods = {ORACLE: lambda: oracle(setup, folders), **gates(setup, folders, seed)}
        methods = {name: methods[name] for name in (ORACLE, PROTOTYPES, GATED, TOP_2)}
    else:
        methods = {**baselines(setup, folders), **gates(setup, folders, seed)}
    for name, method in methods.items():
        sizes = setup.sizes
        settings = {
            **setup.common(setup.splits),
            "part": PART,
            "case": BARE if lane.startswith("bare") else "",
            "method": name,
            "rate": rate,
            "seed": seed,
            "evaluated": "test",
            "steps": sizes.task_steps,
            "batch": sizes.batch,
            "kinds": KINDS,
        }

        def measure(name: str = name, method: Callable = method) -> Mapping[str, Any]:
            return {"model": name, **method()}

        report(setup.store.once(settings, measure))


def kinds(count: int) -> list[Candidate]:
    """The adapters of so many tasks, of different ranks and targets."""
    made = []
    for rank, targets in (KINDS[i % len(KINDS)] for i in range(count)):
        if (rank, targets) == (adapters.RANK, "all-linear"):
            made.append(adapters.MODEL)
            continue
        fields = {"r": rank, "lora_alpha": SCALE * rank, "target_modules": targets}
        made.append(Candidate(f"LoRA r={rank}", fields, single=True))
    return made


def baselines(setup: Setup, folders: Mapping[str, Path]) -> dict[str, Callable[[], dict]]:
    """What else can be done with the same adapters."""
    return {
        ORACLE: lambda: oracle(setup, folders),
        BEST: lambda: best_single(setup, folders),
        UNIFORM: lambda: merged(setup, folders, "linear"),
        TIES: lambda: merged(setup, folders, "ties", density=TIES_DENSITY),
        ARROW: lambda: arrow(setup, folders),
    }


def gates(setup: Setup, folders: Mapping[str, Path], seed: int) -> dict[str, Callable[[], dict]]:
    """The mixture routed by prompt, by gates that saw training prompts alone."""
    return {
        PROTOTYPES: lambda: routed(setup, prototypes(setup, folders), certain=True),
        GATED: lambda: routed(setup, trained(setup, folders, seed), certain=True),
        PROBABILITY: lambda: routed(setup, trained(setup, folders, seed), certain=False),
        TOP_2: lambda: routed(setup, trained(setup, folders, seed, 2), certain=False),
    }


def best_single(setup: Setup, folders: Mapping[str, Path]) -> dict[str, Any]:
    """The adapter that is best on all tasks' validation rows together."""
    model = composed(setup, folders)
    validation = {s.name: s.sheet("validation", setup.tokenizer) for s in setup.splits}
    losses = {}
    for name in folders:
        with model.use_experts(name):
            losses[name] = mean(evaluate(model, validation)["loss"])
    best = min(losses, key=lambda name: losses[name])
    with model.use_experts(best):
        return {"chosen": best, **evaluate(model, sheets(setup))}


def arrow(setup: Setup, folders: Mapping[str, Path]) -> dict[str, Any]:
    """Arrow's routers (arXiv:2405.11157): for each token the four experts that amplify it most."""
    model = composed(
        setup,
        folders,
        router="arrow",
        router_init="arrow",
        routing_level="token",
        router_scope="site",
        num_experts_per_tok=min(4, len(folders)),
    )
    return evaluate(model, sheets(setup))


def prototypes(setup: Setup, folders: Mapping[str, Path]) -> Any:
    """A gate made of a few prompts of each task, without training."""
    model = composed(setup, folders)
    initialise(model, "prototype", prompts(gate_texts(setup, setup.splits)))
    return model


def trained(setup: Setup, folders: Mapping[str, Path], seed: int, top: int = 1) -> Any:
    """A gate trained on whose a prompt is."""
    model = composed(setup, folders, num_experts_per_tok=top)
    train_gate(model, gate_texts(setup, setup.splits), seed=seed)
    return model


def routed(setup: Setup, model: Any, certain: bool) -> dict[str, Any]:
    """The figures of a gated model; certain: its choice has the weight 1."""
    with decided(model) if certain else nullcontext():
        return evaluate(model, sheets(setup))


def without_template(split: Split) -> Split:
    """The same rows without the words that nearly all of the task's prompts have."""
    task = Task(split.name, split.train, split.test)
    bare = task.without_template()
    validation = Task(split.name, split.train, split.validation).without_template().test
    return replace(split, train=bare.train, test=bare.test, validation=validation)
