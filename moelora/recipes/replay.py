"""A growing pool: a task added beside the old ones, of which some texts, chosen by k-means, are
trained on again.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..training.datasets import Texts
from ..training.gate import GateReport, labelled_texts, prompt_features, train_gate
from ..validation import check_integer, check_number


@dataclass(frozen=True)
class AddedTask:
    """What `add_task` did: by old task the numbers of the texts that were replayed, and how the
    gate learned.

    expert_seconds: how long the new expert trained; 0 where no `args` were given.
    """

    name: str
    kept: dict[str, list[int]]
    gate: GateReport
    expert_seconds: float = 0.0


def select_replay(features: Tensor, share: float | int, *, seed: int = 0) -> list[int]:
    """The numbers of the texts to keep: those nearest to the centres of k-means clusters, one each,
    in order.

    features: `[n, d]`, such as `prompt_features` gives. share: of the texts as a float from 0.0 to
    1.0, rounded up to k = ⌈share · n⌉ clusters, or k itself as an integer. Needs scikit-learn (`pip
    install moelora[replay]`).

    Raises:
        ValueError, TypeError: more clusters than texts, a share out of range, the integer 1 (which
        could mean both),
            or features that are no finite matrix.
    """
    check_integer("seed", seed, 0)
    if features.dim() != 2 or not bool(features.isfinite().all()):
        raise ValueError(
            f"features has shape {tuple(features.shape)}; expected finite numbers [texts, d], one row a text."
        )
    texts = len(features)
    clusters = _clusters(share, texts)
    if clusters in (0, texts):
        return list(range(clusters))
    points = features.detach().double().cpu()
    taken: list[int] = []
    for centre in _centres(points, clusters, seed):
        distances = (points - centre).square().sum(1)
        distances[taken] = torch.inf
        taken.append(int(distances.argmin()))
    return sorted(taken)


def add_task(
    model: Any,
    name: str,
    texts: Texts,
    *,
    adapter: Any = None,
    old: Mapping[str, Texts],
    replay: float | int,
    seed: int = 0,
    gate: Mapping[str, Any] | None = None,
    args: Any = None,
) -> AddedTask:
    """Add the expert `name` for the task of `texts`, and train the gate on those and on a part of
    the old tasks'.

    Of each old task's texts `select_replay(…, replay)` keeps those nearest to the centres of
    clusters of what the gate reads (`prompt_features`). The other experts keep their bits; with
    replay=0.0 nothing tells the gate of them.
    adapter: a PEFT adapter, else the expert is fresh (B = 0). old: by expert the old tasks' texts
    ("(base)" too, with `null_expert`). args: `TrainingArguments` to train the new expert with, on
    `texts` alone. gate: what `train_gate` takes. An error leaves the model as it was.

    Raises:
        ValueError, TypeError: as `add_expert`, `train_gate` and `select_replay`.
    """
    if not len(texts):
        raise ValueError(f"There are no texts for {name!r}: give some.")
    # Before anything moves: unknown experts and empty tasks.
    for task, own in old.items():
        labelled_texts(model, {task: own})
    kept = {
        task: select_replay(prompt_features(model, own), replay, seed=seed)
        for task, own in old.items()
    }
    replayed = {task: old[task].subset(rows) for task, rows in kept.items() if rows}
    with _undone_on_error(model, name):
        model.add_expert(name, adapter=adapter, seed=seed)
        seconds = 0.0
        if args is not None:
            from ..training.stages import train_expert

            seconds = train_expert(model, name, texts, args)
        report = train_gate(model, {**replayed, name: texts}, **{"seed": seed, **(gate or {})})
    return AddedTask(name, kept, report, seconds)


def _clusters(share: float | int, texts: int) -> int:
    """How many of `texts` texts `share` means."""
    if isinstance(share, int) and not isinstance(share, bool):
        check_integer("share", share, 0)
        if share == 1:
            raise ValueError(
                "share=1 could mean one text or all: write 1.0 for all, or a share such as 0.01."
            )
        if share > texts:
            raise ValueError(
                f"share={share} asks for {share} clusters of {texts} texts: give at most {texts}, or a share from "
                "0.0 to 1.0."
            )
        return share
    check_number("share", share, 0.0, 1.0)
    # Rounding before: 0.07 · 100 is 7.000000000000001.
    return math.ceil(round(share * texts, 9))


def _centres(points: Tensor, clusters: int, seed: int) -> Tensor:
    """The centres `[clusters, d]` of k-means on points `[n, d]`."""
    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning
    from threadpoolctl import threadpool_limits

    # Sums of several threads come in any order. Texts that are alike make fewer clusters than asked
    # for, which is warned of; one that is nearest to two centres is taken once all the same.
    with threadpool_limits(1), warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        found = KMeans(clusters, n_init="auto", random_state=seed).fit(points.numpy())
    return torch.from_numpy(found.cluster_centers_)


@contextmanager
def _undone_on_error(model: Any, name: str) -> Iterator[None]:
    """Where what is inside fails, the expert `name` is not there and the routers are what they
    were.
    """
    existed = name in model.moelora_config.expert_names
    routers = copy.deepcopy(model.moelora.routers.state_dict())
    try:
        yield
    except BaseException:
        if not existed and name in model.moelora_config.expert_names:
            model.remove_expert(name)
            model.moelora.routers.load_state_dict(routers)
        raise
