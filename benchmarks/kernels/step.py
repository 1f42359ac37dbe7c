"""One step, in a process of its own: `python -m benchmarks.kernels.step NAME --part FILE`.

Every unit, candidate and row is a line in the part file as soon as it is there; a process that is
begun again with the same file leaves out what is done, and what ended the one before.
"""

from __future__ import annotations

import argparse
import os
import time
import traceback
from importlib import import_module
from pathlib import Path

import torch

from benchmarks.kernels import cases, steps
from benchmarks.kernels.candidates import on_a_gpu
from benchmarks.kernels.faults import few, with_faults
from benchmarks.kernels.part import read, write
from benchmarks.kernels.run import DeviceLost, Run, Unit, reason

# The device is lost to this process.
LOST = 70


def run_units(settings: argparse.Namespace) -> None:
    """Every unit of this shard that is not over."""
    part: Path = settings.part
    device = torch.device("cpu" if settings.tiny else "cuda")
    asked = on_a_gpu
    if settings.tiny:
        asked = with_faults if settings.step == steps.LINEARS else few
    run = Run(
        cases.INTERPRETED if settings.tiny else cases.CUDA,
        device,
        settings.out,
        settings.deadline,
        lambda name: write(part, {"doing": name}),
        asked=asked,
    )
    module, function = steps.named(settings.step).units.split(":")
    units = getattr(import_module(f"{steps.ROOM}.{module}"), function)
    record = read(part)
    for nth, (name, found) in enumerate(units(run)):
        if nth % settings.shards != settings.shard or name in record.over:
            continue
        if os.getppid() != settings.parent:
            return
        if time.time() > run.deadline:
            write(part, {"row": {"case": name, "not run": "no time was left"}})
            continue
        run.avoid = record.avoid.get(name, set())
        _run_unit(run, part, (name, found))


def _run_unit(run: Run, part: Path, unit: Unit) -> None:
    """The rows of a unit; an error in it is one of them."""
    name, found = unit
    start = time.perf_counter()
    write(part, {"begin": name})
    try:
        for row in found():
            write(part, {"row": row})
    except Exception as error:
        traceback.print_exc()
        run.check_alive(error)
        write(part, {"row": {"case": name, "failed": reason(error)}})
    print(f"{name}: {time.perf_counter() - start:.1f} s", flush=True)
    write(part, {"end": name})


def main() -> None:
    """The command; `benchmarks.kernels.runner` calls it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("step")
    parser.add_argument("--part", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--deadline", type=float, required=True)
    parser.add_argument("--shard", type=int, default=0)
    parser.add_argument("--shards", type=int, default=1)
    parser.add_argument("--parent", type=int, required=True)
    parser.add_argument("--tiny", action="store_true")
    settings = parser.parse_args()
    try:
        run_units(settings)
    except DeviceLost as error:
        write(settings.part, {"last": f"device lost: {error}"})
        # Nothing that would be cleaned up answers any more.
        os._exit(LOST)


if __name__ == "__main__":
    main()
