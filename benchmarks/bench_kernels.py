"""The kernels on a CPU or a GPU: against the frozen linear, single LoRAs and other ways to compute
a mixture.

python -m benchmarks.bench_kernels [--quick] [--device cpu|cuda] [--out FOLDER] [--only
forward,decode,…] Run it from the root; where the packages are not installed, with
PYTHONPATH=kernels. It needs torch and no more.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from moelora_kernels import build_plan

from benchmarks.harness import RESULTS, save, table
from benchmarks.kernels.bounds import peaks_of
from benchmarks.kernels.candidates import make_inputs, ours
from benchmarks.kernels.cases import Suite, suite_for
from benchmarks.kernels.layer import layer_decode
from benchmarks.kernels.measures import MODES, Row, Run, cases, decode, growth, memory, scaling
from benchmarks.kernels.plot import plot
from benchmarks.kernels.questions import questions
from benchmarks.kernels.targets import summary

# Every name of --only that is not the name of a mode.
MEASURES: dict[str, Callable[[Run], Iterable[Row]]] = {
    "growth": growth,
    "decode": decode,
    "layer": layer_decode,
    "memory": memory,
    "scaling": scaling,
    "questions": questions,
}
NAMES = (*(mode.name for mode in MODES), *MEASURES)
SHOWN = (
    "candidate",
    "path",
    "microseconds",
    "over frozen linear",
    "over ours",
    "ratio",
    "share of bound",
)
MORE_SHOWN = ("value", "own MiB", "peak MiB", "TFLOP/s", "not run")


def measure(run: Run, only: list[str], rows: list[Row]) -> None:
    """Add to rows what each asked measure finds, and print it: what was measured stays if a later
    one raises.
    """
    steps: list[Callable[[Run], Iterable[Row]]] = []
    modes = [mode for mode in MODES if mode.name in only]
    if modes:
        steps.append(lambda run: cases(run, modes))
    steps += [MEASURES[name] for name in MEASURES if name in only]
    measured = (row for step in steps for row in step(run))
    for title, group in groupby(measured, lambda row: f"{row['measure']}: {row['case']}"):
        shown = []
        for row in group:
            rows.append(row)
            shown.append(_shown(row))
        print(f"\n{title}\n{table(shown)}", flush=True)


def default_ours(suite: Suite, device: torch.device) -> str:
    """Our candidate that the library itself would choose on this device."""
    case = suite.growth[0]
    inputs = make_inputs(case, device, suite.dtype)
    plan = build_plan(
        inputs.ids, inputs.weights, case.experts, total_rank=case.rank, dtype=suite.dtype
    )
    return ours(plan.backend)


def main(words: list[str] | None = None) -> None:
    """Measure, print tables and the summary of the targets, write the JSON and the plot."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--quick", action="store_true", help="tiny shapes: whether it runs, no figures to keep"
    )
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda"
    )
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--only", default=",".join(NAMES), help=f"some of {','.join(NAMES)}")
    settings = parser.parse_args(words)
    only = settings.only.split(",")
    if unknown := set(only) - set(NAMES):
        parser.error(
            f"--only has {', '.join(sorted(unknown))}, expected some of {', '.join(NAMES)}"
        )
    device = torch.device(settings.device)
    suite = suite_for(device.type, settings.quick)
    peaks, source = peaks_of(device, suite.dtype, settings.quick)
    run = Run(suite, device, peaks, default_ours(suite, device))
    rows: list[Row] = []
    try:
        measure(run, only, rows)
    finally:
        lines = summary(suite, device.type, run.default, rows)
        shown = {
            "suite": suite.name,
            "dtype": str(suite.dtype),
            "rounds": suite.rounds,
            "only": only,
        }
        shown |= {"ours": run.default, "peaks": f"{source}: {peaks}"}
        path = save(f"kernels_{device.type}", shown, rows, settings.out, summary=lines)
    print(f"\npeaks {source}: {peaks}\n\n{table(lines)}\n\n{path}")
    if "scaling" in only:
        print(plot(rows, suite, settings.out / f"kernels_scaling_{device.type}.png"))


def _shown(row: Row) -> dict[str, Any]:
    """The columns of a printed table; microseconds without an exponent."""
    shown = {name: row[name] for name in (*SHOWN, *MORE_SHOWN) if row.get(name) is not None}
    if "microseconds" in shown:
        shown["microseconds"] = f"{shown['microseconds']:.1f}"
    return shown


if __name__ == "__main__":
    main()
