"""A growing pool: a task is added, and a few texts of the old ones are trained on again."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import TrainingArguments

from ..core.model import MixtureModel
from ..training.datasets import Texts
from ..training.fitting import train_expert
from ..training.gate import GateReport, labelled_texts, prompt_features, train_gate
from ..validation import check_integer, check_number


@dataclass(frozen=True)
class AddedTask:
    """What `add_task` did.

    Args:
        name: the new expert's.
        kept: by old task the numbers of the texts that were replayed.
        gate: how the routers were trained.
        expert_seconds: how long the new expert trained; 0 where no `args` were given.
    """

    name: str
    kept: dict[str, list[int]]
    gate: GateReport
    expert_seconds: float = 0.0


def select_replay(features: Tensor, share: float | int, *, seed: int = 0) -> list[int]:
    """The numbers of the texts to keep, in order: of each k-means cluster the most central one.

    Needs scikit-learn (`pip install moelora[replay]`).

    Args:
        features: `[n, d]`, one row a text, such as `prompt_features` gives.
        share: of the texts as a float from 0.0 to 1.0, rounded up to k = ⌈share · n⌉ clusters, or
            k itself as an integer.
        seed: of k-means.

    Raises:
        ValueError: more clusters than texts, a share out of range, the integer 1 (which could mean
            both), or features that are not a finite matrix.
        TypeError: a share that is not a number.
    """
    check_integer("seed", seed, 0)
    if features.dim() != 2 or not bool(features.isfinite().all()):
        shape = tuple(features.shape)
        raise ValueError(f"features has shape {shape}; expected finite numbers [texts, d].")
    clusters = _clusters(share, len(features))
    if clusters in (0, len(features)):
        return list(range(clusters))
    points = features.detach().double().cpu()
    nearest: list[int] = []
    for centre in _centres(points, clusters, seed):
        distances = (points - centre).square().sum(1)
        distances[nearest] = torch.inf
        nearest.append(int(distances.argmin()))
    return sorted(nearest)


def add_task(
    model: MixtureModel,
    name: str,
    texts: Texts,
    *,
    adapter: Any = None,
    old: Mapping[str, Texts],
    replay: float | int,
    seed: int = 0,
    gate: Mapping[str, Any] | None = None,
    args: TrainingArguments | None = None,
) -> AddedTask:
    """Add an expert for a new task, and train the routers on it and on a part of the old tasks.

    Of each old task's texts `select_replay` keeps those nearest to the centres of clusters of what
    the routers read (`prompt_features`). The other experts keep their bits. An error leaves the
    model as it was.

    Args:
        model: the mixture.
        name: the new expert's.
        texts: of the new task.
        adapter: a PEFT adapter to make the expert of; else it is fresh (B = 0).
        old: by expert the old tasks' texts ("(base)" too, with `null_expert`).
        replay: how many of each old task's texts to keep, as the share of `select_replay`. With
            0.0 nothing tells the routers of the old tasks.
        seed: of the new expert, of k-means, and of the routers' training.
        gate: the options of `train_gate`.
        args: to train the new expert with, on `texts` alone; None leaves it as it is.

    Raises:
        ValueError, TypeError: as `add_expert`, `train_gate` and `select_replay`.
    """
    if not len(texts):
        raise ValueError(f"There are no texts for {name!r}: give some.")
    features = {}
    for task, own in old.items():
        # Unknown experts and empty tasks are found before anything moves.
        features[task] = prompt_features(model, labelled_texts(model, {task: own}))
    kept = {task: select_replay(own, replay, seed=seed) for task, own in features.items()}
    replayed = {task: old[task].subset(rows) for task, rows in kept.items() if rows}
    before = copy.deepcopy(model.moelora.routers.state_dict())
    model.add_expert(name, adapter=adapter, seed=seed)
    try:
        seconds = 0.0 if args is None else train_expert(model, name, texts, args)
        report = train_gate(model, {**replayed, name: texts}, **{"seed": seed, **(gate or {})})
    except BaseException:
        model.remove_expert(name)
        model.moelora.routers.load_state_dict(before)
        raise
    return AddedTask(name, kept, report, seconds)


def _clusters(share: float | int, texts: int) -> int:
    """How many of `texts` texts `share` means."""
    if isinstance(share, int) and not isinstance(share, bool):
        check_integer("share", share, 0)
        if share == 1:
            raise ValueError("share=1 could mean one text or all: write 1.0 for all, else a share.")
        if share > texts:
            raise ValueError(f"share={share}: {share} clusters of {texts} texts are too many.")
        return share
    check_number("share", share, 0.0, 1.0)
    # Rounded before: 0.07 · 100 is 7.000000000000001.
    return math.ceil(round(share * texts, 9))


def _centres(points: Tensor, clusters: int, seed: int) -> Tensor:
    """The centres `[clusters, d]` of k-means on points `[n, d]`."""
    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning
    from threadpoolctl import threadpool_limits

    # Several threads would add up in any order. scikit-learn warns where texts that are alike make
    # fewer clusters than asked for; that is fine here, since no text is taken twice.
    with threadpool_limits(1), warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        kmeans = KMeans(clusters, n_init="auto", random_state=seed).fit(points.numpy())
    return torch.from_numpy(kmeans.cluster_centers_)
