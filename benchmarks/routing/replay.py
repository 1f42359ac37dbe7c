"""A pool that grows: each task added last to the others, with some of their texts replayed, then
one deleted.
"""

from __future__ import annotations

import copy
from typing import Any

from benchmarks.routing import bases
from benchmarks.routing.gates import accuracy, confusion, gated
from benchmarks.routing.settings import Settings
from moelora.recipes import add_task
from moelora.training import Texts, train_gate

SHARES = (0.0, 0.1, 0.5)


def run_replay(settings: Settings, seed: int) -> dict[str, Any]:
    """For each share of replay and each task added last, every task's routing accuracy.

    Then the first of the old tasks is deleted: the accuracy of those that remain.
    """
    tokenizer = bases.load_tokenizer(settings.base)
    base = bases.load(settings.base)
    texts = settings.gate_texts(settings.tasks, seed, tokenizer)
    tests = {task.name: Texts.of(task.test, tokenizer) for task in settings.tasks}
    rows = []
    for new in texts:
        old = {name: own for name, own in texts.items() if name != new}
        with gated(base, list(old), seed) as before:
            train_gate(before, old, seed=seed)
            for share in SHARES:
                # A copy is sooner made than the same pool anew.
                model = copy.deepcopy(before)
                add_task(model, new, texts[new], old=old, replay=share, seed=seed)
                row = {
                    "added": new,
                    "replay": share,
                    "accuracy": by_source(confusion(model, tests)),
                }
                deleted = next(iter(old))
                model.remove_expert(deleted)
                left = {name: own for name, own in tests.items() if name != deleted}
                row |= {"deleted": deleted, "accuracy_after": by_source(confusion(model, left))}
                rows.append(row)
    return {"rows": rows}


def by_source(counts: dict[str, dict[str, int]]) -> dict[str, float]:
    """The accuracy of each source of a confusion matrix."""
    return {source: accuracy({source: own}) for source, own in counts.items()}
