"""The kernels on a CPU: against the frozen linear, single LoRAs and other ways to compute a
mixture. A GPU has `make gpu`.

python -m benchmarks.bench_kernels [--quick] [--out FOLDER] [--only forward,decode,…] Run it from
the root; where the packages are not installed, with PYTHONPATH=kernels. It needs torch and no more.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import RESULTS, save, table
from benchmarks.kernels.cases import CPU, QUICK
from benchmarks.kernels.measures import MODES, decode, growth, scaling
from benchmarks.kernels.measures import table as cases
from benchmarks.kernels.plot import plot
from benchmarks.kernels.run import Row, Run, Unit
from benchmarks.kernels.targets import cpu_summary

# Every name of --only that is not the name of a mode.
MEASURES: dict[str, Callable[[Run], Iterator[Unit]]] = {
    "growth": growth,
    "decode": decode,
    "scaling": scaling,
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
    "value",
    "not run",
    "failed",
)


def measure(run: Run, only: list[str], rows: list[Row]) -> None:
    """Add to rows what each asked measure finds, and print it: what was measured stays if a later
    one raises.
    """
    modes = [mode for mode in MODES if mode.name in only]
    asked = [lambda run: cases(run, modes)] if modes else []
    asked += [MEASURES[name] for name in MEASURES if name in only]
    measured = (row for units in asked for _, found in units(run) for row in found())
    for title, group in groupby(measured, lambda row: f"{row['measure']}: {row['case']}"):
        shown = []
        for row in group:
            rows.append(row)
            shown.append(_shown(row))
        print(f"\n{title}\n{table(shown)}", flush=True)


def main(words: list[str] | None = None) -> None:
    """Measure, print tables and the summary of the targets, write the JSON and the plot."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--quick", action="store_true", help="tiny shapes: whether it runs, no figures to keep"
    )
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--only", default=",".join(NAMES), help=f"some of {','.join(NAMES)}")
    settings = parser.parse_args(words)
    only = settings.only.split(",")
    if unknown := set(only) - set(NAMES):
        parser.error(
            f"--only has {', '.join(sorted(unknown))}, expected some of {', '.join(NAMES)}"
        )
    run = Run(QUICK if settings.quick else CPU, torch.device("cpu"))
    rows: list[Row] = []
    try:
        measure(run, only, rows)
    finally:
        lines = cpu_summary(run.suite, run.default, rows)
        shown = {"suite": run.suite.name, "dtype": str(run.suite.dtype), "only": only}
        shown |= {"rounds": run.suite.rounds, "ours": run.default, "peaks": str(run.peaks)}
        path = save("kernels_cpu", shown, rows, settings.out, summary=lines)
    print(f"\npeaks measured in this run: {run.peaks}\n\n{table(lines)}\n\n{path}")
    if "scaling" in only:
        print(plot(rows, run.suite, settings.out / "kernels_scaling_cpu.png"))


def _shown(row: Row) -> dict[str, Any]:
    """The columns of a printed table; microseconds without an exponent."""
    shown = {name: row[name] for name in SHOWN if row.get(name) is not None}
    if "microseconds" in shown:
        shown["microseconds"] = f"{shown['microseconds']:.1f}"
    return shown


if __name__ == "__main__":
    main()
