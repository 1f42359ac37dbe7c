"""The measures of the kernel benchmark: each checks its candidates, times them in turns and yields
rows.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.harness import Timings
from benchmarks.kernels.bounds import Peaks, bound
from benchmarks.kernels.candidates import FROZEN, LORA, Candidate, Inputs, candidates, make_inputs
from benchmarks.kernels.cases import Case, Suite
from benchmarks.kernels.check import Specification, WrongResult
from benchmarks.kernels.timing import Call, captured, peak_bytes, timed

Row = dict[str, Any]
CPU_BYTES = 2 * 2**30
# A decoded token's weights come from far memory: copies of them exceed the cache by this factor.
COLD = 3
# Two candidates take fewer turns than twenty: more rounds for them.
GROWTH_ROUNDS = 3


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
MODES = (
    FORWARD,
    TRAINING,
    Mode("mixture forward", alone=True, backward=False),
    Mode("mixture forward+backward", alone=True, backward=True),
)
ALONE = MODES[3]
DECODE = Mode("decode", alone=False, backward=False)


@dataclass
class Run:
    """One run: where, what, how fast the device could be, and the name of the candidate that is
    ours by default.
    """

    suite: Suite
    device: torch.device
    peaks: Peaks
    default: str

    @property
    def is_gpu(self) -> bool:
        """Whether times are the GPU's."""
        return self.device.type == "cuda"

    def inputs(self, case: Case, seed: int = 0) -> Inputs:
        """The case's tensors on this device."""
        return make_inputs(case, self.device, self.suite.dtype, seed)

    def free_bytes(self) -> float:
        """How much memory a candidate may take."""
        if not self.is_gpu:
            return CPU_BYTES
        torch.cuda.empty_cache()
        return 0.8 * torch.cuda.mem_get_info()[0]


def cases(run: Run, modes: Iterable[Mode]) -> Iterator[Row]:
    """Every candidate of every case in every mode."""
    for case in run.suite.cases:
        inputs = run.inputs(case)
        able, reasons = _able(run, inputs, candidates())
        for mode in modes:
            yield from _timed_rows(run, inputs, able, mode)
            yield from ({"case": case.name, "measure": mode.name, **reason} for reason in reasons)


def scaling(run: Run) -> Iterator[Row]:
    """The mixture's part alone, forward and backward, along each axis, for one candidate of each
    kind.
    """
    for axis, value, case in run.suite.scaling():
        inputs = run.inputs(case)
        named = [c for c in candidates() if c.kind != "lora" or c.name == LORA]
        able, _ = _able(run, inputs, [c for c in named if c.path is None])
        for row in _timed_rows(run, inputs, able, ALONE):
            yield {**row, "measure": f"scaling {axis}", "value": value}


def decode(run: Run) -> Iterator[Row]:
    """A few tokens without gradients: on a GPU in a CUDA graph, over as many copies as leave the
    cache cold.

    On a CPU there is one copy, and a base that fits into the cache is faster than its bound.
    """
    for case in run.suite.decoding():
        inputs = run.inputs(case)
        running = [c for c in candidates() if c.captured or not run.is_gpu]
        able, reasons = _able(run, inputs, running)
        reasons += [
            {"candidate": c.name, "not run": "waits for the device, no CUDA graph holds it"}
            for c in candidates()
            if c not in running
        ]
        copies = [inputs, *(run.inputs(case, seed) for seed in range(1, _copies(run, inputs)))]
        calls, failures = _decoding(run, copies, able)
        timings = timed(calls, run.device, run.suite.rounds).divided_by(len(copies))
        yield from _rows(run, inputs, {name: able[name] for name in calls}, DECODE, timings)
        yield from (
            {"case": case.name, "measure": DECODE.name, **reason} for reason in reasons + failures
        )


def growth(run: Run) -> list[Row]:
    """Our time at many experts over that at few, both in one run of turns."""
    few, many = (run.inputs(case) for case in run.suite.growth)
    asked = [candidate for candidate in candidates() if candidate.backend and not candidate.path]
    able = _able(run, few, asked)[0].keys() & _able(run, many, asked)[0].keys()
    rows: list[Row] = []
    for mode in (TRAINING, ALONE):
        for candidate in asked:
            if candidate.name not in able:
                continue
            timings = timed(
                {"few": _call(candidate, few, mode), "many": _call(candidate, many, mode)},
                run.device,
                GROWTH_ROUNDS * run.suite.rounds,
            )
            rows.append(
                {
                    "case": f"{many.case.name} over E={few.case.experts}",
                    "measure": f"growth, {mode.name}",
                    "candidate": candidate.name,
                    "path": f"{candidate.path_taken(many)} over {candidate.path_taken(few)}",
                    "microseconds": 1e6 * timings.median("many"),
                    "microseconds min": 1e6 * min(timings.seconds["many"]),
                    **spread("ratio", timings.ratio("many", "few")),
                }
            )
    return rows


def memory(run: Run) -> list[Row]:
    """The most GPU memory of a forward and backward pass, in all and beyond what is trained, x and
    the base.
    """
    case = run.suite.cases[0]
    if not run.is_gpu:
        return [{"case": case.name, "measure": "memory", "not run": "needs a GPU"}]
    inputs = run.inputs(case)
    able, reasons = _able(run, inputs, candidates())
    rows: list[Row] = [{"case": case.name, "measure": "memory", **reason} for reason in reasons]
    own = {name: peak_bytes(_call(candidate, inputs, TRAINING)) for name, candidate in able.items()}
    held = {
        name: sum(t.nbytes for t in (*c.trained(inputs), inputs.base)) for name, c in able.items()
    }
    for name in able:
        row = {
            "case": case.name,
            "measure": "memory",
            "candidate": name,
            "own MiB": own[name] / 2**20,
        }
        row["peak MiB"] = (own[name] + held[name]) / 2**20
        rows.append({**row, "ratio": (own[name] + held[name]) / (own[LORA] + held[LORA])})
    return rows


def _able(
    run: Run, inputs: Inputs, asked: list[Candidate]
) -> tuple[dict[str, Candidate], list[Row]]:
    """Those that run here and compute the mixture, and the reasons of the others; WrongResult where
    one is wrong.
    """
    specification = Specification(inputs)
    able = {}
    reasons = []
    for candidate in asked:
        reason = candidate.why_not(inputs, run.free_bytes())
        if reason is None and candidate.kind == "mixture":
            reason = _failure(lambda candidate=candidate: specification.check(candidate))
        if reason is None:
            able[candidate.name] = candidate
        else:
            reasons.append({"candidate": candidate.name, "not run": reason})
    return able, reasons


def _failure(attempt: Call) -> str | None:
    """What a candidate died of: a run on a lent GPU goes on without it; a wrong result ends it."""
    try:
        attempt()
    except WrongResult:
        raise
    except Exception as error:
        return f"failed: {type(error).__name__}: {str(error).partition(chr(10))[0]}"
    return None


def _call(candidate: Candidate, inputs: Inputs, mode: Mode) -> Call:
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


def _decoding(
    run: Run, copies: list[Inputs], able: dict[str, Candidate]
) -> tuple[dict[str, Call], list[Row]]:
    """A call of each candidate over all copies, and why others have none."""
    calls: dict[str, Call] = {}
    reasons = []
    for name, candidate in able.items():
        each = [_call(candidate, inputs, DECODE) for inputs in copies]

        def prepare(name: str = name, each: list[Call] = each) -> None:
            def all_copies() -> object:
                return [call() for call in each]

            calls[name] = captured(all_copies) if run.is_gpu else all_copies

        if reason := _failure(prepare):
            reasons.append({"candidate": name, "not run": reason})
    return calls, reasons


def _copies(run: Run, inputs: Inputs) -> int:
    if not run.is_gpu:
        return 1
    cache = torch.cuda.get_device_properties(run.device).L2_cache_size
    return math.ceil(COLD * cache / inputs.base.nbytes)


def _timed_rows(run: Run, inputs: Inputs, able: dict[str, Candidate], mode: Mode) -> list[Row]:
    calls = {name: _call(candidate, inputs, mode) for name, candidate in able.items()}
    return _rows(run, inputs, able, mode, timed(calls, run.device, run.suite.rounds))


def _rows(
    run: Run, inputs: Inputs, able: dict[str, Candidate], mode: Mode, timings: Timings
) -> list[Row]:
    rows = []
    for name, candidate in able.items():
        case = inputs.case
        if name == LORA:
            case = Case(case.tokens, case.d_in, case.d_out, 1, case.top_k * case.rank, 1)
        elif candidate.kind == "lora":
            case = Case(case.tokens, case.d_in, case.d_out, 1, 16, 1)
        parts = {
            "base": candidate.kind == "base" or not mode.alone,
            "adapter": candidate.kind != "base",
        }
        ideal = bound(case, inputs.x.element_size(), run.peaks, backward=mode.backward, **parts)
        rows.append(
            {
                "case": inputs.case.name,
                "measure": mode.name,
                "candidate": name,
                "path": candidate.path_taken(inputs),
                "microseconds": 1e6 * timings.median(name),
                "microseconds min": 1e6 * min(timings.seconds[name]),
                **spread("over frozen linear", timings.ratio(name, FROZEN)),
                **(
                    spread("over ours", timings.ratio(name, run.default))
                    if run.default in able
                    else {}
                ),
                "bound microseconds": 1e6 * ideal,
                "share of bound": ideal / timings.median(name),
            }
        )
    return rows


def spread(name: str, ratio: tuple[float, float, float]) -> Row:
    """A ratio of `Timings` as three columns."""
    return dict(zip((name, f"{name} min", f"{name} max"), ratio, strict=True))
