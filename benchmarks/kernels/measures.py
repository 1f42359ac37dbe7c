"""The measures of the kernel benchmark: each checks its candidates, times them in turns and yields
rows, unit after unit.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch

from benchmarks.kernels.bounds import bound
from benchmarks.kernels.candidates import Candidate, Inputs
from benchmarks.kernels.cases import Case
from benchmarks.kernels.check import Specification
from benchmarks.kernels.names import FROZEN, LORA
from benchmarks.kernels.run import Row, Run, Unit, failed, spread, times
from benchmarks.kernels.timing import Call, Measured, peak_bytes

# A decoded token's weights come from far memory: copies of them exceed the cache by this factor.
COLD = 3
# Few candidates take fewer turns than twenty: more rounds for them.
MORE_ROUNDS = 3


@dataclass(frozen=True)
class Mode:
    """How a candidate is called: with the base or with its output given, and with or without
    gradients.
    """

    name: str
    alone: bool
    backward: bool


FORWARD = Mode("forward", alone=False, backward=False)
TRAINING = Mode("forward+backward", alone=False, backward=True)
FORWARD_ALONE = Mode("mixture forward", alone=True, backward=False)
ALONE = Mode("mixture forward+backward", alone=True, backward=True)
DECODE = Mode("decode", alone=False, backward=False)
DECODE_EAGER = Mode("decode, eager", alone=False, backward=False)
MODES = (FORWARD, TRAINING, FORWARD_ALONE, ALONE)
WITH_BASE = MODES[:2]


def right(run: Run) -> Iterator[Unit]:
    """Ours on every case against the specification: this also fills the cache of compiled kernels
    for what is timed later.
    """
    cases = (*run.suite.cases, *run.suite.growth[1:])
    for case in cases[:1] if run.suite.interpreted else cases:

        def rows(case: Case = case) -> Iterator[Row]:
            inputs = run.inputs(case)
            mine = [candidate for candidate in run.asked() if candidate.backend]
            able, reasons = able_ones(run, inputs, mine)
            columns = {"check": "candidate", "case": case.name}
            yield from ({**columns, "candidate": name, "ok": True} for name in able)
            yield from ({**columns, **row} for row in reasons)

        yield f"right: {case.name}", rows


def table(run: Run, modes: Iterable[Mode] = WITH_BASE) -> Iterator[Unit]:
    """Every candidate of every case in every mode."""
    for case in run.suite.cases:
        yield case.name, lambda case=case: case_rows(run, case, modes)


def alone(run: Run) -> Iterator[Unit]:
    """Ours without the base, over the bound: the cases of the two paths."""
    for case in run.suite.growth[: 1 if run.suite.interpreted else 2]:

        def rows(case: Case = case) -> Iterator[Row]:
            asked = [c for c in run.asked() if c.backend or c.kind == "base"]
            return case_rows(run, case, (FORWARD_ALONE, ALONE), asked)

        yield case.name, rows


def case_rows(
    run: Run, case: Case, modes: Iterable[Mode], asked: list[Candidate] | None = None
) -> Iterator[Row]:
    """The rows of one case: the candidates that compute the mixture, and why others do not."""
    inputs = run.inputs(case)
    able, reasons = able_ones(run, inputs, run.asked() if asked is None else asked)
    for mode in modes:
        calls = {name: call_of(candidate, inputs, mode) for name, candidate in able.items()}
        yield from mode_rows(run, inputs, able, mode, run.timed(calls))
        yield from ({"case": case.name, "measure": mode.name, **row} for row in reasons)


def scaling(run: Run) -> Iterator[Unit]:
    """The mixture's part alone, forward and backward, along each axis, for one candidate of each
    kind.
    """
    for axis, value, case in run.suite.scaling():

        def rows(axis: str = axis, value: int = value, case: Case = case) -> Iterator[Row]:
            named = [c for c in run.asked() if c.kind != "lora" or c.name == LORA]
            for row in case_rows(run, case, [ALONE], [c for c in named if c.path is None]):
                yield {**row, "measure": f"scaling {axis}", "value": value}

        yield f"{axis}={value}", rows


def decode(run: Run) -> Iterator[Unit]:
    """A few tokens without gradients: on a GPU in a CUDA graph, over as many copies as leave the
    cache cold; and without a graph, as a user waits for it.

    On a CPU there is one copy, and a base that fits into the cache is faster than its bound.
    """
    for case in run.suite.decoding():
        yield case.name, lambda case=case: _decode_rows(run, case)


def _decode_rows(run: Run, case: Case) -> Iterator[Row]:
    inputs = run.inputs(case)
    running = [c for c in run.asked() if c.captured or not run.is_gpu]
    able, reasons = able_ones(run, inputs, running)
    reasons += [
        {"candidate": c.name, "not run": "waits for the device, no CUDA graph holds it"}
        for c in run.asked()
        if c not in running
    ]
    copies = [inputs, *(run.inputs(case, seed) for seed in range(1, _copies(run, inputs)))]
    calls: dict[str, Call] = {}
    failures: dict[str, str] = {}
    for name, candidate in able.items():
        each = [call_of(candidate, copy, DECODE) for copy in copies]

        def all_copies(each: list[Call] = each) -> object:
            return [call() for call in each]

        def prepare(name: str = name, call: Call = all_copies) -> None:
            calls[name] = run.captured(call)

        if why := run.attempt(name, prepare):
            failures[name] = why
    timings = run.timed(calls).divided_by(len(copies))
    yield from mode_rows(run, inputs, able, DECODE, timings)
    if run.is_gpu:
        eager = {name: call_of(candidate, inputs, DECODE) for name, candidate in able.items()}
        yield from mode_rows(run, inputs, able, DECODE_EAGER, run.timed(eager, hidden=False))
    columns = {"case": case.name, "measure": DECODE.name}
    yield from ({**columns, **row} for row in reasons)
    yield from failed(failures, **columns)


def growth(run: Run) -> Iterator[Unit]:
    """Our time at many experts over that at few, all in one run of turns."""
    for mode in (TRAINING,) if run.suite.interpreted else (TRAINING, ALONE):
        yield mode.name, lambda mode=mode: _growth_rows(run, mode)


def _growth_rows(run: Run, mode: Mode) -> Iterator[Row]:
    cases = [run.inputs(case) for case in run.suite.growth]
    asked = [candidate for candidate in run.asked() if candidate.backend and not candidate.path]
    able = [able_ones(run, inputs, asked)[0] for inputs in cases]
    few = cases[0].case
    for candidate in asked:
        calls = {
            inputs.case.name: call_of(candidate, inputs, mode)
            for inputs, names in zip(cases, able)
            if candidate.name in names
        }
        if few.name not in calls:
            continue
        timings = run.timed(calls, more=1 if run.suite.interpreted else MORE_ROUNDS)
        for inputs in cases[1:]:
            many = inputs.case
            if not {many.name, few.name} <= timings.seconds.keys():
                continue
            yield {
                "case": f"{many.name} over E={few.experts}",
                "measure": f"growth, {mode.name}",
                "candidate": candidate.name,
                "path": f"{candidate.path_taken(inputs)} over {candidate.path_taken(cases[0])}",
                **times(timings, many.name),
                **spread("ratio", timings.ratio(many.name, few.name)),
            }


def memory(run: Run) -> Iterator[Unit]:
    """The most GPU memory of a forward and backward pass, in all and beyond what is trained, x and
    the base.
    """
    yield "memory", lambda: _memory_rows(run)


def _memory_rows(run: Run) -> Iterator[Row]:
    case = run.suite.cases[0]
    columns = {"case": case.name, "measure": "memory"}
    if not run.is_gpu:
        yield {**columns, "not run": "needs a GPU"}
        return
    inputs = run.inputs(case)
    able, reasons = able_ones(run, inputs, run.asked())
    own: dict[str, float] = {}
    failures: dict[str, str] = {}
    for name, candidate in able.items():

        def measure(name: str = name, candidate: Candidate = candidate) -> None:
            own[name] = peak_bytes(call_of(candidate, inputs, TRAINING))

        if why := run.attempt(name, measure):
            failures[name] = why
    held = {name: sum(t.nbytes for t in (*able[name].trained(inputs), inputs.base)) for name in own}
    for name in own:
        row = {**columns, "candidate": name, "own MiB": own[name] / 2**20}
        row["peak MiB"] = (own[name] + held[name]) / 2**20
        if LORA in own:
            row["ratio"] = (own[name] + held[name]) / (own[LORA] + held[LORA])
        yield row
    yield from ({**columns, **row} for row in reasons)
    yield from failed(failures, **columns)


def able_ones(
    run: Run, inputs: Inputs, asked: list[Candidate]
) -> tuple[dict[str, Candidate], list[Row]]:
    """Those that run here and compute the mixture, and rows that say why others do not."""
    specification = Specification(inputs)
    able = {}
    reasons = []
    for candidate in asked:
        refused = candidate.why_not(inputs, run.free_bytes())
        if refused is not None:
            reasons.append({"candidate": candidate.name, "not run": refused})
            continue
        why = None
        if candidate.kind == "mixture":
            why = run.attempt(
                candidate.name, lambda candidate=candidate: specification.check(candidate)
            )
        if why is None:
            able[candidate.name] = candidate
        else:
            reasons.append({"candidate": candidate.name, "failed": why})
    return able, reasons


def call_of(candidate: Candidate, inputs: Inputs, mode: Mode) -> Call:
    """The candidate on these inputs, ready to be timed."""
    # Of the base nothing is left without it: it stays what the others are compared with.
    inputs = inputs.alone() if mode.alone and candidate.kind != "base" else inputs
    leaves = candidate.trained(inputs)

    def forward() -> object:
        with torch.no_grad():
            return candidate.run(inputs)

    def training() -> object:
        return torch.autograd.grad(candidate.run(inputs), leaves, inputs.dy)

    return training if mode.backward else forward


def mode_rows(
    run: Run, inputs: Inputs, able: dict[str, Candidate], mode: Mode, timings: Measured
) -> Iterator[Row]:
    """What the times of one mode say, over the frozen linear, over ours and over the bound."""
    columns = {"case": inputs.case.name, "measure": mode.name}
    for name in timings.seconds:
        candidate = able[name]
        ideal = _bound_of(run, candidate, inputs, mode)
        row = {
            **columns,
            "candidate": name,
            "path": candidate.path_taken(inputs),
            **times(timings, name),
        }
        for column, other in (("over frozen linear", FROZEN), ("over ours", run.default)):
            if other in timings.seconds:
                row |= spread(column, timings.ratio(name, other))
        row["calculated bound microseconds"] = 1e6 * ideal
        yield {**row, "share of bound": ideal / timings.median(name)}
    yield from failed(timings.failed, **columns)


def _bound_of(run: Run, candidate: Candidate, inputs: Inputs, mode: Mode) -> float:
    """The calculated least seconds of what the candidate computes."""
    case = inputs.case
    if candidate.kind == "lora":
        rank = case.top_k * case.rank if candidate.name == LORA else 16
        case = Case(case.tokens, case.d_in, case.d_out, 1, rank, 1)
    parts = {
        "base": candidate.kind == "base" or not mode.alone,
        "adapter": candidate.kind != "base",
    }
    return bound(case, inputs.x.element_size(), run.peaks, backward=mode.backward, **parts)


def _copies(run: Run, inputs: Inputs) -> int:
    if not run.is_gpu:
        return 1
    cache = torch.cuda.get_device_properties(run.device).L2_cache_size
    return math.ceil(COLD * cache / inputs.base.nbytes)
