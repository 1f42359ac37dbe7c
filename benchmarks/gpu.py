"""`make gpu`: all that only a GPU can tell, in one run of at most nine minutes, as one JSON in a
folder.

python3 -m benchmarks.gpu [--seconds 540] [--out FOLDER]      from the root; nothing is installed
python3 -m benchmarks.gpu --tiny                              every step without a GPU

`kernels/steps.py` lists the steps. Each is a subprocess with a limit of time; what is wrong, dies
or hangs is a row, and the rest goes on. The JSON is written again whenever there are new rows, so
nothing is lost whenever the run ends; the exit status says whether anything failed.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import RESULTS, machine, table
from benchmarks.kernels.cases import CUDA, INTERPRETED
from benchmarks.kernels.runner import Runner
from benchmarks.kernels.steps import FAULTS, Step, steps_for
from benchmarks.kernels.targets import summary

Row = dict[str, Any]
SECONDS = 540.0
# For the summary, after the last step.
LAST_SECONDS = 5.0
SHOWN = ("step", "case", "measure", "check", "candidate", "path", "dtype", "failed", "error")


class Stopped(BaseException):
    """Somebody ends the run: what was found is written first."""


def run(settings: argparse.Namespace) -> list[Row]:
    """Every step; the rows that failed other than on purpose."""
    started = time.time()
    out: Path = settings.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"kernels_{'tiny' if settings.tiny else 'gpu'}.json"
    about = machine()
    about["commit"] = settings.commit or about["commit"]
    shown = {"seconds allowed": settings.seconds, "jobs": settings.jobs, "tiny": settings.tiny}
    suite = INTERPRETED if settings.tiny else CUDA
    deadline = started + settings.seconds - LAST_SECONDS
    with tempfile.TemporaryDirectory() as work, (out / f"{path.stem}.log").open("ab") as log:
        runner = Runner(out, Path(work), log, deadline, settings.jobs, settings.tiny, lambda: None)

        def save() -> None:
            rows = runner.rows()
            lines = summary(suite, rows)
            seconds = {"seconds": round(time.time() - started, 1), "steps": runner.seconds}
            content = {"benchmark": path.stem, "machine": about, "settings": {**shown, **seconds}}
            write_whole(path, {**content, "summary": lines, "rows": rows})

        runner.save = save
        try:
            runner.run(chosen_steps(settings))
        finally:
            runner.stop()
            save()
            rows = runner.rows()
            report(path, rows, summary(suite, rows), time.time() - started)
    return [row for row in rows if has_failed(row) and not on_purpose(row)]


def chosen_steps(settings: argparse.Namespace) -> list[Step]:
    """Those whose names begin with one that was asked for; all where none was."""
    asked = settings.only.split(",") if settings.only else [""]
    return [step for step in steps_for(settings.tiny) if step.name.startswith(tuple(asked))]


def write_whole(path: Path, content: dict[str, Any]) -> None:
    """The file is the old one or the new one, whenever the run is ended."""
    written = path.with_suffix(".part")
    written.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    os.replace(written, path)


def has_failed(row: Row) -> bool:
    """Whether a row says that something is wrong or died."""
    return "failed" in row or row.get("ok") is False


def on_purpose(row: Row) -> bool:
    """Whether it had to."""
    return row["step"] == FAULTS.name or "on purpose" in str(row.get("candidate"))


def report(path: Path, rows: list[Row], lines: list[Row], seconds: float) -> None:
    """Print what failed, and the ratios against the targets."""
    wrong = [row for row in rows if has_failed(row)]
    left_out = [row for row in rows if "not run" in row and "candidate" not in row]
    for title, some in (("failed", wrong), ("not run", left_out)):
        if some:
            names = (*SHOWN, "not run")
            print(f"\n{title}\n{table([{k: r[k] for k in names if k in r} for r in some])}")
    verdicts = {True: "pass", False: "fail", None: "no figure"}
    print(f"\ntargets\n{table([{**line, 'met': verdicts[line['met']]} for line in lines])}")
    print(f"\n{len(rows)} rows, {len(wrong)} failed, {seconds:.0f} s: {path}", flush=True)


def _stop(number: int, frame: Any) -> None:
    # Once is enough: `timeout` sends it twice, and the second must not end the writing.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise Stopped(signal.Signals(number).name)


def main(words: list[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT") or RESULTS))
    parser.add_argument("--seconds", type=float, default=SECONDS, help="for all steps together")
    parser.add_argument("--jobs", type=int, default=min(12, os.cpu_count() or 1))
    parser.add_argument("--commit", help="where there is no .git to ask")
    parser.add_argument("--only", help="the steps whose names begin so, separated by commas")
    parser.add_argument("--tiny", action="store_true", help="every step without a GPU")
    settings = parser.parse_args(words)
    if not settings.tiny and not torch.cuda.is_available():
        sys.exit("There is no GPU here. `--tiny` runs every step under Triton's interpreter.")
    signal.signal(signal.SIGTERM, _stop)
    try:
        failures = run(settings)
    except Stopped as stopped:
        sys.exit(f"ended by {stopped}")
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main()
