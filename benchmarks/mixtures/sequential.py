"""Part b: tasks that come one after another, each task's data gone when the next one comes.

Ours adds an expert a task; its gate learns from the new task and a tenth of the old ones' prompts
(replay), or is told what the new task's prompts are like and learns nothing (description).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from benchmarks.mixtures import adapters
from benchmarks.mixtures.adapters import composed
from benchmarks.mixtures.data import Split, batches
from benchmarks.mixtures.evaluation import evaluate, mean
from benchmarks.mixtures.gating import decided, gate_texts, prompts
from benchmarks.mixtures.models import build
from benchmarks.mixtures.rates import search
from benchmarks.mixtures.setup import Setup, report
from benchmarks.mixtures.store import Record
from benchmarks.mixtures.training import contiguous_head, fit
from moelora.recipes import add_task
from moelora.recipes.replay import select_replay
from moelora.training import Texts, prompt_features, train_gate
from moelora.training.router_init import initialise

PART = "sequential"
REPLAY = 0.1
TIES_DENSITY = 0.2
ONE = f"one LoRA r={adapters.RANK}, task after task"
ORACLE = "each task by its own LoRA (oracle)"
UNIFORM = "LoRAs merged evenly"
TIES = f"LoRAs merged by TIES, density {TIES_DENSITY}"
OURS = f"a new expert a task, gate by {REPLAY:.0%} replay"
OURS_2 = f"{OURS}, top 2"
DESCRIBED = "a new expert a task, gate by descriptions"


def phases(setup: Setup) -> list[list[str]]:
    """What can be done side by side, and then what needs it: learning rates, then seeds."""
    after = [f"{kind} {seed}" for seed in range(setup.seeds) for kind in ("pool", "one")]
    return [["adapters' rate", "the one LoRA's rate"], after]


def run(setup: Setup, lane: str) -> None:
    """One lane of `phases`."""
    if lane == "adapters' rate":
        adapters.best_rate(setup)
    elif lane == "the one LoRA's rate":
        best_rate_of_one(setup)
    elif lane.startswith("one"):
        rate = best_rate_of_one(setup)
        report(one_after_another(setup, rate, int(lane.split()[1]), "test"))
    else:
        pool(setup, int(lane.split()[1]))


def order(setup: Setup, seed: int) -> list[Split]:
    """The order in which a seed's tasks come."""
    return random.Random(f"order {seed}").sample(setup.splits, len(setup.splits))


def settings_of(setup: Setup, method: str, rate: float, seed: int, part: str) -> dict[str, Any]:
    """All that decides what a method gives."""
    sizes = setup.sizes
    own = {"part": PART, "method": method, "rate": rate, "seed": seed, "evaluated": part}
    own |= {"steps": sizes.task_steps, "batch": sizes.batch, "rank": adapters.RANK}
    return {**setup.common(setup.splits), **own}


def best_rate_of_one(setup: Setup) -> float:
    """The learning rate after which one LoRA, trained on, knows all tasks best."""

    def loss(rate: float) -> float:
        return mean(one_after_another(setup, rate, 0, "validation")["loss"])

    return search(loss, setup.rates)


def one_after_another(setup: Setup, rate: float, seed: int, part: str) -> Record:
    """One LoRA trained on task after task; "learned" is each task's loss right after its own."""
    settings = settings_of(setup, ONE, rate, seed, part)

    def run() -> Mapping[str, Any]:
        model = build(adapters.MODEL, setup.base, seed, setup.dtype)
        learned = {}
        for split in order(setup, seed):
            own = adapters.trial(setup, split)
            texts = batches([split], setup.tokenizer, own.steps, own.batch, seed)
            fit(model, texts, setup.pad, own.batch, rate, setup.work / "one")
            if part == "test":
                sheet = split.sheet(part, setup.tokenizer)
                learned |= evaluate(model, {split.name: sheet})["loss"]
        sheets = {split.name: split.sheet(part, setup.tokenizer) for split in setup.splits}
        return {"model": ONE, "learned": learned, **evaluate(model, sheets)}

    return setup.store.once(settings, run)


def pool(setup: Setup, seed: int) -> None:
    """Everything that is made of the tasks' own adapters."""
    rate = adapters.best_rate(setup)
    tasks = order(setup, seed)
    folders = {s.name: adapters.adapter(setup, s, adapters.MODEL, rate, seed) for s in tasks}
    methods: dict[str, Callable[[], dict[str, Any]]] = {
        ORACLE: lambda: oracle(setup, folders),
        UNIFORM: lambda: merged(setup, folders, "linear"),
        TIES: lambda: merged(setup, folders, "ties", density=TIES_DENSITY),
        OURS: lambda: grown(setup, tasks, folders, seed),
        OURS_2: lambda: grown(setup, tasks, folders, seed, top=2),
        DESCRIBED: lambda: described(setup, tasks, folders),
    }
    for name, method in methods.items():
        settings = settings_of(setup, name, rate, seed, "test")

        def run(name: str = name, method: Callable = method) -> Mapping[str, Any]:
            return {"model": name, **method()}

        report(setup.store.once(settings, run))


def oracle(setup: Setup, folders: Mapping[str, Path]) -> dict[str, Any]:
    """Each task by its own adapter, alone and with weight 1: what it was when it was learned."""
    model = composed(setup, folders)
    loss: dict[str, float] = {}
    accuracy: dict[str, float] = {}
    for split in setup.splits:
        with model.use_experts(split.name):
            scored = evaluate(model, {split.name: split.sheet("test", setup.tokenizer)})
        loss |= scored["loss"]
        accuracy |= scored.get("accuracy", {})
    return {"loss": loss, **({"accuracy": accuracy} if accuracy else {})}


def merged(
    setup: Setup, folders: Mapping[str, Path], recipe: str, **options: Any
) -> dict[str, Any]:
    """All adapters as one change of the base's weights."""
    # In fp32, or the sums would be rounded to the base's 16 bits.
    model = composed(setup, folders, dtype="float32")
    weights = dict.fromkeys(folders, 1 / len(folders))
    plain = model.merge_and_unload(weights, recipe=recipe, **options)
    contiguous_head(plain)
    return evaluate(plain, sheets(setup))


def grown(
    setup: Setup, tasks: list[Split], folders: Mapping[str, Path], seed: int, top: int = 1
) -> dict[str, Any]:
    """A pool that grows task by task, its gate trained on the new one and a tenth of the old.

    top: how many experts act; of several each with its probability, of one wholly.
    """
    begun = [split.name for split in tasks[:top]]
    model = composed(setup, {name: folders[name] for name in begun}, num_experts_per_tok=top)
    texts = gate_texts(setup, tasks)
    memory = {name: _kept(model, texts[name], seed) for name in begun}
    if top > 1:
        # The last of them is the new one; a pool of fewer has no choice to make.
        train_gate(model, {**memory, begun[-1]: texts[begun[-1]]}, seed=seed)
    for split in tasks[top:]:
        new = texts[split.name]
        path = str(folders[split.name])
        add_task(model, split.name, new, adapter=path, old=memory, replay=1.0, seed=seed)
        # What is not kept is gone when the next task comes.
        memory[split.name] = _kept(model, new, seed)
    with decided(model) if top == 1 else nullcontext():
        return evaluate(model, sheets(setup))


def _kept(model: Any, texts: Texts, seed: int) -> Texts:
    """The tenth of a task's texts that stays."""
    return texts.subset(select_replay(prompt_features(model, texts), REPLAY, seed=seed))


def described(setup: Setup, tasks: list[Split], folders: Mapping[str, Path]) -> dict[str, Any]:
    """A pool that grows by descriptions: a few prompts of each new task, and nothing is trained.

    The descriptors' space is made for the first two tasks and stays.
    """
    begun = [split.name for split in tasks[:2]]
    model = composed(setup, {name: folders[name] for name in begun}, router="descriptor")
    texts = prompts(gate_texts(setup, tasks), count=len(tasks[0].train))
    initialise(model, "prototype", {name: texts[name] for name in begun})
    for split in tasks[2:]:
        model.add_expert(split.name, adapter=str(folders[split.name]))
        model.describe_experts({split.name: texts[split.name]})
    with decided(model):
        return evaluate(model, sheets(setup))


def sheets(setup: Setup) -> dict[str, Any]:
    """All test rows, as they are scored."""
    return {split.name: split.sheet("test", setup.tokenizer) for split in setup.splits}
