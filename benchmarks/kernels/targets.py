"""The targets of the kernels, and what the rows of a run say to them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from benchmarks.kernels.candidates import FROZEN, GROUPED, LORA, LORA_16, PAIRS, PEFT_LOOP, ours
from benchmarks.kernels.cases import Suite
from benchmarks.kernels.layer import MEASURE as LAYER
from benchmarks.kernels.layer import ROUTED
from benchmarks.kernels.measures import ALONE, FORWARD, TRAINING

Row = dict[str, Any]


@dataclass(frozen=True)
class Target:
    """A figure of one row, at most (or at least) `limit`.

    column of the row of (case, measure, candidate); inverse: 1 over it. case None is any case.
    """

    what: str
    measure: str
    candidate: str
    column: str
    limit: float
    case: str | None = None
    at_least: bool = False
    inverse: bool = False

    def judged(self, rows: list[Row]) -> Row:
        """What came out, the least and the most of it, and whether the target is met; None if it
        was not measured.
        """
        matching = [row for row in rows if self._is_of(row)]
        line = {"what": self.what, "target": f"{'≥' if self.at_least else '≤'} {self.limit}"}
        if not matching:
            return {**line, "value": None, "met": None}
        value = matching[0][self.column]
        low, high = (matching[0].get(f"{self.column} {end}") for end in ("min", "max"))
        if self.inverse and low and high:
            value, low, high = 1 / value, 1 / high, 1 / low
        met = value >= self.limit if self.at_least else value <= self.limit
        return {**line, "value": value, "min": low, "max": high, "met": met}

    def _is_of(self, row: Row) -> bool:
        named = (row.get("measure"), row.get("candidate")) == (self.measure, self.candidate)
        return named and self.column in row and self.case in (None, row.get("case"))


def summary(suite: Suite, device: str, default: str, rows: list[Row]) -> list[Row]:
    """Every target of the device with what came out."""
    targets = gpu_targets(suite, default) if device == "cuda" else cpu_targets(suite, default)
    return [target.judged(rows) for target in targets]


def cpu_targets(suite: Suite, default: str) -> list[Target]:
    """Against the loop and one LoRA of rank K·r, and growth with E; with the base and without."""
    first = suite.cases[0].name
    few, many = suite.growth
    targets = []
    for mode in (TRAINING, ALONE):
        of = f", {mode.name}"
        targets += [
            Target(
                f"{PEFT_LOOP} / ours{of}",
                mode.name,
                PEFT_LOOP,
                "over ours",
                3.0,
                first,
                at_least=True,
            ),
            Target(f"ours / {LORA}{of}", mode.name, LORA, "over ours", 1.3, first, inverse=True),
            Target(
                f"ours, E={many.experts} / E={few.experts}{of}",
                f"growth, {mode.name}",
                default,
                "ratio",
                1.5,
            ),
        ]
    return targets


def gpu_targets(suite: Suite, default: str) -> list[Target]:
    """The table of targets, with the default backend's choice of path where none is named."""
    first = suite.cases[0].name
    few, many = suite.growth
    fwd = FORWARD.name
    both = TRAINING.name
    over = "over frozen linear"
    targets = [
        Target(f"ours / {FROZEN}, {fwd}", fwd, default, over, 1.18, first),
        Target(f"ours / {FROZEN}, {both}", both, default, over, 1.28, first),
        Target(f"ours / {FROZEN}, E={many.experts}, {both}", both, default, over, 1.45, many.name),
        Target(
            f"ours, E={many.experts} / E={few.experts}, {both}",
            f"growth, {both}",
            default,
            "ratio",
            1.15,
        ),
    ]
    for peer, limit in (
        (PEFT_LOOP, 5.0),
        (GROUPED, 1.5),
        (PAIRS, 1.5),
        ("MeteoRA's kernel (not a candidate)", 2.0),
    ):
        targets += [
            Target(
                f"{peer} / ours, E={c.experts}, {both}",
                both,
                peer,
                "over ours",
                limit,
                c.name,
                at_least=True,
            )
            for c in suite.growth
        ]
    targets.append(
        Target(f"ours / {LORA_16}, {both}", both, LORA_16, "over ours", 1.10, first, inverse=True)
    )
    layer = suite.layer
    for tokens in suite.decode_tokens:
        what = f"ours / the bases of a {layer.name}, decode, T={tokens}"
        targets.append(Target(what, LAYER, default, over, 1.10, layer.named(tokens)))
        targets.append(
            Target(f"{what}, router and all", LAYER, ROUTED, over, 1.10, layer.named(tokens))
        )
    for case, path, limit in ((few, "dense", 0.75), (many, "grouped", 0.60)):
        for measure in ("mixture forward", ALONE.name):
            what = f"share of the bound, {path}, {measure}"
            name = ours(default.removeprefix("ours "), path)
            targets.append(
                Target(what, measure, name, "share of bound", limit, case.name, at_least=True)
            )
    targets.append(Target(f"peak memory, ours / {LORA}", "memory", default, "ratio", 1.10, first))
    return targets
