"""The base as a choice: how many texts of no task go to it, of kinds that its gate has seen and of
others.
"""

from __future__ import annotations

from typing import Any

from benchmarks.routing import bases
from benchmarks.routing.gates import choices, gated
from benchmarks.routing.settings import Settings
from moelora.config import NO_EXPERT
from moelora.training import Texts, train_gate


def run_outside(settings: Settings, seed: int) -> dict[str, Any]:
    """The share of each source's test prompts that goes to the base, and what kind of source each
    is.

    The gate chooses among all tasks but the last, and the base, for which it learns texts of some
    sources. Where those sources are tasks themselves, it chooses among the other tasks.
    """
    tokenizer = bases.load_tokenizer(settings.base)
    base = bases.load(settings.base)
    inside = [task for task in settings.tasks if task not in settings.outside]
    held_out = [inside.pop()] if len(inside) == len(settings.tasks) else []
    texts = settings.gate_texts(inside, seed, tokenizer)
    learned = [task for task in settings.outside if task.name in settings.outside_train]
    outside = settings.gate_texts(learned, seed, tokenizer)
    kinds = {task.name: "task" for task in inside} | {
        task.name: "a task without an expert" for task in held_out
    }
    for task in settings.outside:
        kinds[task.name] = "outside, learned" if task.name in outside else "outside, unseen"
    with gated(base, [task.name for task in inside], seed, null_expert=True) as model:
        train_gate(model, {**texts, NO_EXPERT: Texts.joined(list(outside.values()))}, seed=seed)
        share = {}
        for task in (*inside, *held_out, *settings.outside):
            found = choices(model, Texts.of(task.test, tokenizer))
            share[task.name] = found.count(NO_EXPERT) / len(found)
    return {"share": share, "kinds": kinds}
