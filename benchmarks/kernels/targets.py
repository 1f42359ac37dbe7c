"""The targets of the kernels, and what the rows of a run say to them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from benchmarks.kernels.cases import Suite
from benchmarks.kernels.names import (
    FROZEN,
    GRAPH,
    GROUPED,
    LAYER,
    LORA,
    LORA_16,
    MODEL,
    PAIRS,
    PEFT_LOOP,
    TRAINING_STEP,
    ours,
)

Row = dict[str, Any]
FORWARD = "forward"
BOTH = "forward+backward"
FORWARD_ALONE = "mixture forward"
BOTH_ALONE = "mixture forward+backward"
# What a model runs on a GPU: its factors are fp32.
DEFAULT = ours("triton", fp32=True)


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
            return {**line, "value": None, "met": None, "why": self._why(rows)}
        value = matching[0][self.column]
        low, high = (matching[0].get(f"{self.column} {end}") for end in ("min", "max"))
        if self.inverse and low and high:
            value, low, high = 1 / value, 1 / high, 1 / low
        met = value >= self.limit if self.at_least else value <= self.limit
        return {**line, "value": value, "min": low, "max": high, "met": met}

    def _is_of(self, row: Row) -> bool:
        named = (row.get("measure"), row.get("candidate")) == (self.measure, self.candidate)
        return named and self.column in row and self.case in (None, row.get("case"))

    def _why(self, rows: list[Row]) -> str:
        """Why there is no figure, as far as a row says it."""
        for row in rows:
            of_case = self.case in (None, row.get("case"))
            here = of_case and row.get("measure") in (None, self.measure)
            if here and row.get("candidate") == self.candidate:
                said = row.get("failed") or row.get("not run")
                if said:
                    return said
        return "not measured"


def summary(suite: Suite, rows: list[Row]) -> list[Row]:
    """Every target of a GPU with what came out."""
    return [target.judged(rows) for target in gpu_targets(suite)]


def cpu_summary(suite: Suite, default: str, rows: list[Row]) -> list[Row]:
    """Every target of a CPU with what came out."""
    return [target.judged(rows) for target in cpu_targets(suite, default)]


def cpu_targets(suite: Suite, default: str) -> list[Target]:
    """Against the loop and one LoRA of rank K·r, and growth with E; with the base and without."""
    first = suite.cases[0].name
    few, many = suite.growth[:2]
    targets = []
    for mode in (BOTH, BOTH_ALONE):
        targets += [
            Target(
                f"{PEFT_LOOP} / ours, {mode}",
                mode,
                PEFT_LOOP,
                "over ours",
                3.0,
                first,
                at_least=True,
            ),
            Target(f"ours / {LORA}, {mode}", mode, LORA, "over ours", 1.3, first, inverse=True),
            Target(
                f"ours, E={many.experts} / E={few.experts}, {mode}",
                f"growth, {mode}",
                default,
                "ratio",
                1.5,
            ),
        ]
    return targets


def gpu_targets(suite: Suite) -> list[Target]:
    """The table of targets: with the factors in fp32, as a model keeps them, and in 16 bits."""
    targets = []
    for name in (DEFAULT, ours("triton")):
        targets += _against_the_base(suite, name)
    first = suite.cases[0].name
    for peer, limit in ((PEFT_LOOP, 5.0), (GROUPED, 1.5), (PAIRS, 1.5)):
        targets += [
            Target(f"{peer} / ours, {c.name}", BOTH, peer, "over ours", limit, c.name, True)
            for c in suite.growth[:2]
        ]
    what = "MeteoRA's kernel (not a candidate) / ours"
    targets.append(Target(what, BOTH, "MeteoRA's kernel", "over ours", 2.0, at_least=True))
    what = f"ours / {LORA_16}, {BOTH}"
    targets.append(Target(what, BOTH, LORA_16, "over ours", 1.10, first, inverse=True))
    for case, path, limit in zip(suite.growth, ("dense", "grouped"), (0.75, 0.60)):
        for measure in (FORWARD_ALONE, BOTH_ALONE):
            what = f"share of the calculated bound, {path}, {measure}"
            name = ours("triton", path, fp32=True)
            targets.append(Target(what, measure, name, "share of bound", limit, case.name, True))
    targets.append(Target(f"peak memory, ours / {LORA}", "memory", DEFAULT, "ratio", 1.10, first))
    return targets + _of_models(suite)


def _against_the_base(suite: Suite, name: str) -> list[Target]:
    over = "over frozen linear"
    first = suite.cases[0].name
    many = suite.growth[1]
    few = suite.growth[0].experts
    of_many = f"{name}, E={many.experts}"
    targets = [
        Target(f"{name} / {FROZEN}, {FORWARD}", FORWARD, name, over, 1.18, first),
        Target(f"{name} / {FROZEN}, {BOTH}", BOTH, name, over, 1.28, first),
        Target(f"{of_many} / {FROZEN}, {BOTH}", BOTH, name, over, 1.45, many.name),
    ]
    case = f"{many.name} over E={few}"
    what = f"{of_many} / E={few}, {BOTH}"
    return [*targets, Target(what, f"growth, {BOTH}", name, "ratio", 1.15, case)]


def _of_models(suite: Suite) -> list[Target]:
    """Of a decoder layer as a model has it; of the small model there is no target, only figures."""
    layer = suite.layer
    mixture = ours("triton")
    over = "over frozen base"
    targets = []
    for tokens in suite.decode_tokens:
        what = f"a mixture's {layer.name} / without, {GRAPH}, T={tokens}"
        case = layer.named(tokens)
        targets.append(Target(what, f"{LAYER} {GRAPH}", mixture, over, 1.10, case))
    for what, shape in ((LAYER, layer), (MODEL, suite.model)):
        case = shape.named(shape.batch * shape.length)
        measure = f"{what} {TRAINING_STEP}"
        line = f"a mixture's {shape.name} / one LoRA, {TRAINING_STEP}"
        targets.append(Target(line, measure, mixture, "over one LoRA", 1.10, case))
    return targets
