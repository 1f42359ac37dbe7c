"""From what the parts found to rows: losses and accuracies of the candidates, and the targets with
what came.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.routing.gates import MAIN, accuracy
from benchmarks.routing.mixtures import BASE, SEQUENCE, TOKEN, UNIFORM
from benchmarks.routing.parts import Results
from benchmarks.routing.scoring import Score
from benchmarks.routing.settings import Settings

ORACLE = "each task by its own expert (oracle)"
TOTAL = "joint LoRA, total"
ACTIVE = "joint LoRA, active"


@dataclass(frozen=True)
class Spread:
    """The mean, least and greatest of a figure over seeds."""

    mean: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        """The spread of these values."""
        found = list(values)
        low = min(found)
        high = max(found)
        # Rounding may put the mean of equal numbers beside them.
        return cls(min(max(sum(found) / len(found), low), high), low, high)

    def text(self, form: str = ".3f") -> str:
        """mean (least–greatest); the mean alone where all are shown alike."""
        mean, low, high = (format(v, form) for v in (self.mean, self.low, self.high))
        return mean if low == high else f"{mean} ({low}–{high})"


Scores = Mapping[str, Score]


def candidates(settings: Settings, results: Results) -> dict[str, list[Scores]]:
    """By candidate its score on every task, one a seed."""
    mixtures = [found["scores"] for found in results["mixtures"]]
    rank = settings.sizes.rank
    many = len(settings.tasks) * settings.sizes.rank
    found = {BASE: [m[BASE] for m in mixtures]}
    found |= {f"expert {name}": [m[name] for m in mixtures] for name in settings.names}
    found[UNIFORM] = [m[UNIFORM] for m in mixtures]
    found[ORACLE] = [{name: m[name][name] for name in settings.names} for m in mixtures]
    found |= {SEQUENCE: [m[SEQUENCE] for m in mixtures], TOKEN: [m[TOKEN] for m in mixtures]}
    found[f"{TOTAL} parameters of the experts, r={many}"] = [
        r["scores"] for r in results["joint, total"]
    ]
    found[f"{ACTIVE} parameters of the mixture, r={rank}"] = [
        r["scores"] for r in results["joint, active"]
    ]
    return found


def mean_loss(scores: Scores) -> float:
    """The mean over tasks of the nats a token."""
    return sum(score.loss for score in scores.values()) / len(scores)


def mean_accuracy(scores: Scores) -> float | None:
    """The mean share of right answers over tasks with answers, or None where no task has any."""
    found = [score.accuracy for score in scores.values() if score.accuracy is not None]
    return sum(found) / len(found) if found else None


def candidate_rows(found: Mapping[str, Sequence[Scores]]) -> list[dict[str, Any]]:
    """One row a candidate for the JSON, each figure one a seed."""
    rows = []
    for name, seeds in found.items():
        tasks = list(seeds[0])
        rows.append(
            {
                "candidate": name,
                "loss": {task: [s[task].loss for s in seeds] for task in tasks},
                "mean loss": [mean_loss(s) for s in seeds],
                "accuracy": {task: [s[task].accuracy for s in seeds] for task in tasks},
                "mean accuracy": [mean_accuracy(s) for s in seeds],
            }
        )
    return rows


def ratio(found: Mapping[str, Sequence[Scores]], name: str, reference: str) -> Spread:
    """The mean loss of a candidate over that of another, seed by seed."""
    pairs = zip(found[name], found[reference], strict=True)
    return Spread.of(mean_loss(a) / mean_loss(b) for a, b in pairs)


def harder_ratio(results: Results, name: str = SEQUENCE) -> Spread:
    """The same of a gate among all tasks over their own experts."""
    pairs = [(r["scores"][name], r["scores"]["oracle"]) for r in results["harder"]]
    return Spread.of(mean_loss(a) / mean_loss(b) for a, b in pairs)


def gate_accuracies(results: Results) -> dict[str, Spread]:
    """By kind of gate its routing accuracy; the selector's too."""
    found = {}
    for part in (results["gates"], results["bare"]):
        found |= {
            kind: Spread.of(r["accuracy"][kind] for r in part) for kind in part[0]["accuracy"]
        }
    if "selector" in results:
        found["selector that writes the name"] = selector_accuracy(results)
    return found


def selector_accuracy(results: Results) -> Spread:
    """The share of prompts after which the selector wrote the task's name."""
    return Spread.of(accuracy(r["confusion"]) for r in results["selector"])


def same_prompts(results: Results) -> Spread:
    """The gate's routing accuracy over the selector's, on the selector's prompts."""
    gates = [r["on the selector's prompts"] for r in results["gates"]]
    written = [accuracy(r["confusion"]) for r in results["selector"]]
    # Nothing right has no ratio: as if one prompt were.
    least = 1 / max(
        1, sum(sum(own.values()) for own in results["selector"][0]["confusion"].values())
    )
    # Not every seed has a selector.
    return Spread.of(a / max(b, least) for a, b in zip(gates, written))


def replay_spreads(
    results: Results, share: float, field: str = "accuracy"
) -> dict[tuple[str, str], Spread]:
    """By (task added, task asked) the accuracy at this share of replay."""
    runs = [[row for row in r["rows"] if row["replay"] == share] for r in results["replay"]]
    return {
        (row["added"], task): Spread.of(rows[i][field][task] for rows in runs)
        for i, row in enumerate(runs[0])
        for task in row[field]
    }


def old_tasks(spreads: Mapping[tuple[str, str], Spread]) -> list[Spread]:
    """Those of the tasks that were there before."""
    return [spread for (added, task), spread in spreads.items() if added != task]


def shares(counts: Sequence[Mapping[str, Mapping[str, int]]]) -> list[list[float]]:
    """Confusion matrices of all seeds as one of shares, rows summing to 1."""
    rows = []
    for source in counts[0]:
        total = {name: sum(own[source][name] for own in counts) for name in counts[0][source]}
        rows.append([n / sum(total.values()) for n in total.values()])
    return rows


def targets(settings: Settings, results: Results) -> list[dict[str, Any]]:
    """What was to be reached, what came (mean over seeds, worst seed), and whether the mean reaches
    it.
    """
    found = candidates(settings, results)
    gates = gate_accuracies(results)[MAIN]
    latency = results["latency"][0]["ratios"]
    singles = [f"expert {name}" for name in settings.names]
    rows = [
        _row("routing accuracy", gates, 0.99, least=True),
        _row(
            "routing accuracy over the selector's, same prompts",
            same_prompts(results),
            1.0,
            least=True,
            strict=True,
        ),
        _row(
            "choosing over a forward of the base",
            Spread(*latency["gate over a forward of the base"]),
            0.05,
        ),
        _row(
            "gated forward over a forced one",
            Spread(*latency["gated forward over a forced one"]),
            1.05,
        ),
        _row(
            "selector's seconds over the gate's",
            Spread(*latency["selector over the gate"]),
            10.0,
            least=True,
        ),
        _row("gated loss over the oracle's", ratio(found, SEQUENCE, ORACLE), 1.01),
        _row(
            "gated loss over the uniform merge's", ratio(found, SEQUENCE, UNIFORM), 1.0, strict=True
        ),
    ]
    best = min(singles, key=lambda name: Spread.of(map(mean_loss, found[name])).mean)
    rows.append(
        _row(
            f"gated loss over the best single expert's ({best})",
            ratio(found, SEQUENCE, best),
            1.0,
            strict=True,
        )
    )
    if "harder" in results:
        rows.append(
            _row("the same with the harder tasks: over the oracle's", harder_ratio(results), 1.03)
        )
    kept = min(old_tasks(replay_spreads(results, 0.1)), key=lambda spread: spread.mean)
    rows.append(_row("worst old task after adding one with 10 % replay", kept, 0.97, least=True))
    return rows


def _row(
    what: str, came: Spread, target: float, least: bool = False, strict: bool = False
) -> dict[str, Any]:
    beyond = came.mean > target if least else came.mean < target
    met = beyond or (not strict and came.mean == target)
    sign = (">" if least else "<") if strict else ("≥" if least else "≤")
    return {
        "what": what,
        "came": came.mean,
        "least": came.low,
        "greatest": came.high,
        "target": f"{sign} {target:.4g}",
        "met": met,
    }
