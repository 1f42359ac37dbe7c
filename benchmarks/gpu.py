"""`make gpu`: all that only a GPU can tell, in one run of at most eight minutes, as JSON in a
folder.

python3 -m benchmarks.gpu [--out FOLDER]      from the root, with PYTHONPATH=kernels where nothing
is installed

First what must be true (gpu_checks), then the open questions and the figures of bench_kernels,
then, in the time that is left, a tuned table of tiles. What was found is written after each step,
so that nothing is lost; the exit status says whether everything that must be true was.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from moelora_kernels.triton import tune
from moelora_kernels.triton.tiles import save_tuned

from benchmarks import bench_kernels
from benchmarks.harness import RESULTS, save, table
from benchmarks.kernels import gpu_checks, gpu_questions

Row = dict[str, Any]
# Tuning begins only where it ends before the eight minutes are over.
TUNE_BEFORE = 330.0
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def run(device: torch.device, out: Path, quick: bool = False) -> bool:
    """Every step; whether all that must be true was."""
    started = time.perf_counter()
    rows = []
    on_gpu = device.type == "cuda"
    # Triton's interpreter, which stands in for a GPU in the tests, multiplies bf16 wrongly.
    shapes, dtypes = (
        (gpu_checks.SMALL, [torch.float32]) if quick else (gpu_checks.SHAPES, list(DTYPES))
    )
    steps: dict[str, Callable[[], Iterable[Row]]] = {
        "correctness": lambda: gpu_checks.correctness(shapes, device, dtypes)
    }
    if on_gpu:
        steps |= {
            "compile": lambda: gpu_checks.compiled(device, dtypes[0]),
            "graphs": lambda: gpu_checks.graphs(device, dtypes[0]),
            "wide blocks": lambda: gpu_questions.wide_blocks(device),
            "planes": lambda: gpu_questions.planes(device),
        }
    for name, step in steps.items():
        _step(name, step, rows)
        seconds = time.perf_counter() - started
        save("kernels_gpu_checks", {"device": str(device), "seconds": seconds}, rows, out)
    words = ["--device", device.type, "--out", str(out), *(["--quick"] if quick else [])]
    _step("bench_kernels", lambda: bench_kernels.main(words) or [], rows)
    if on_gpu and time.perf_counter() - started < TUNE_BEFORE:
        _step("tune", lambda: _tune(device, out), rows)
    seconds = time.perf_counter() - started
    path = save("kernels_gpu_checks", {"device": str(device), "seconds": seconds}, rows, out)
    wrong = [row for row in rows if row.get("ok") is False]
    print(f"\n{len(rows)} rows, {len(wrong)} wrong, {seconds:.0f} s: {path}")
    print(table(wrong) if wrong else "")
    return not wrong


def _step(name: str, step: Callable[[], Iterable[Row]], rows: list[Row]) -> None:
    """Add what a step finds; one that dies is a row, and the others go on: the machine is lent for
    once.
    """
    start = time.perf_counter()
    before = len(rows)
    try:
        for row in step():
            rows.append(row)
    except Exception as error:
        traceback.print_exc()
        message = f"{type(error).__name__}: {str(error)[:300]}"
        rows.append({"check": name, "case": "the step itself", "error": message, "ok": False})
    print(f"\n{name}: {time.perf_counter() - start:.0f} s\n{table(rows[before:])}", flush=True)


def _tune(device: torch.device, out: Path) -> list[Row]:
    tiles = tune.tune(tune.CASES, [torch.bfloat16], device, tune.seconds_on_gpu)
    gpu = torch.cuda.get_device_name(device)
    path = out / f"tiles_{gpu.replace(' ', '-').lower()}.json"
    save_tuned(path, gpu, tiles)
    return [{"check": "tune", "case": f"{len(tiles)} tiles in {path.name}", "ok": True}]


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT") or RESULTS))
    settings = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("There is no GPU here. What needs none is tested by `make test`.")
    sys.exit(0 if run(torch.device("cuda"), settings.out) else 1)


if __name__ == "__main__":
    main()
