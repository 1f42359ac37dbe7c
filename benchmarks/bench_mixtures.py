"""Where a mixture wins: against single LoRAs on all tasks at once, on tasks that come one after
another, on adapters that exist, and on tasks that conflict.

python -m benchmarks.bench_mixtures [--tasks FOLDER] [--only joint|sequential|existing|interference]
[--seeds N] [--models PART_OF_NAME,…] [--workers N] [--report]

Every run is written as soon as it is done; a second start does what is missing. --report makes the
tables and pictures of what is there.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

from benchmarks.bench_routing import HARDER, NAMES
from benchmarks.harness import RESULTS
from benchmarks.mixtures import existing, interference, joint, sequential
from benchmarks.mixtures.conflicts import CASES
from benchmarks.mixtures.data import Split
from benchmarks.mixtures.report import write
from benchmarks.mixtures.setup import Setup, Sizes
from benchmarks.mixtures.store import Store
from benchmarks.routing import bases
from benchmarks.routing.parts import prepare_process
from benchmarks.routing.tasks import corpus_tasks, read_tasks

PARTS = ("joint", "sequential", "existing", "interference")
FILE = "mixtures_cpu.json"
# Rows of each of the corpus' domains, to learn from and to be measured on.
CORPUS_ROWS = (200, 100)


@dataclass(frozen=True)
class Lane:
    """What one process does after another, one model or one seed of a part."""

    part: str
    name: str

    def run(self, setup: Setup) -> str:
        """Do it all; returns its name."""
        runs: dict[str, Callable[[Setup, str], None]] = {
            "joint": joint.run,
            "sequential": sequential.run,
            "existing": existing.run,
            "interference": interference.run,
        }
        runs[self.part](setup, self.name)
        return f"{self.part}: {self.name}"


def phases(setup: Setup, part: str) -> list[list[Lane]]:
    """A part's lanes, those first that others wait for."""
    found: dict[str, Callable[[Setup], list[list[str]]]] = {
        "joint": lambda setup: [joint.lanes(setup)],
        "sequential": sequential.phases,
        "existing": existing.phases,
        "interference": lambda setup: [interference.lanes(setup)],
    }
    return [[Lane(part, name) for name in phase] for phase in found[part](setup)]


def arguments(words: list[str] | None) -> argparse.Namespace:
    """The command line's options."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--tasks", type=Path, help="a folder with <task>/train.jsonl, test.jsonl (default: corpus)"
    )
    parser.add_argument("--names", default=f"{NAMES},{HARDER}", help="the tasks, of --tasks")
    parser.add_argument("--only", choices=PARTS, action="append", help="parts, in turn")
    parser.add_argument("--models", help="only those with one of these in their name")
    parser.add_argument("--base", default="smollm2", help="smollm2, tiny, an id or a folder")
    parser.add_argument("--layers", type=int, help="cut smollm2 or tiny to so many layers")
    parser.add_argument("--dtype", default="bfloat16", help="of the frozen base")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, help="of part joint")
    parser.add_argument("--task-steps", type=int, help="of each task's own adapter")
    parser.add_argument("--conflict-steps", type=int, help="of part interference")
    parser.add_argument("--conflicts", help="how many conflicting tasks, such as 2,4,8")
    parser.add_argument("--cases", default="domain,word", help=f"of {', '.join(CASES)}")
    parser.add_argument("--validation", type=int, help="rows a task to choose learning rates on")
    parser.add_argument("--scored", type=int, help="test rows a task (default: all)")
    parser.add_argument("--rates", help="learning rates for all models, such as 1e-3,2e-3")
    parser.add_argument("--workers", type=int, default=2, help="processes, one thread each")
    parser.add_argument("--work", type=Path, default=Path("outputs/mixtures"))
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--report", action="store_true", help="tables and pictures alone")
    options = parser.parse_args(words)
    for name, value in vars(options).items():
        if type(value) is int and value < 1:
            raise ValueError(f"{name}={value}: expected 1 at least.")
    if unknown := sorted({*options.cases.split(",")} - {*CASES}):
        raise ValueError(f"cases: {unknown} unknown; the cases are {', '.join(CASES)}.")
    return options


def sizes_of(options: argparse.Namespace) -> Sizes:
    """The defaults, and what the command line changes."""
    given = {
        "steps": options.steps,
        "task_steps": options.task_steps,
        "interference_steps": options.conflict_steps,
        "validation": options.validation,
        "interference_tasks": tuple(_numbers(options.conflicts, int)) or None,
        "cases": tuple(options.cases.split(",")),
    }
    return Sizes(**{name: value for name, value in given.items() if value is not None})


def setup_of(options: argparse.Namespace) -> Setup:
    """What the parts are told; raises ValueError where the tasks cannot be read."""
    base = bases.prepare(options.base, options.layers, options.work / "base")
    sizes = sizes_of(options)
    if options.tasks is None:
        train, test = CORPUS_ROWS
        rows = {"train": train + sizes.validation, "test": options.scored or test}
        tasks = corpus_tasks(bases.load_tokenizer(base), **rows)
    else:
        tasks = read_tasks(options.tasks, [name for name in options.names.split(",") if name])
    return Setup(
        base=base,
        splits=tuple(Split.of(task, sizes.validation, options.scored) for task in tasks),
        seeds=options.seeds,
        sizes=sizes,
        store=Store(options.output / FILE),
        work=options.work,
        dtype=options.dtype,
        rates=tuple(_numbers(options.rates, float)) or None,
        only_models=tuple(options.models.split(",")) if options.models else None,
    )


def run_lanes(setup: Setup, lanes: Iterable[Lane], workers: int) -> None:
    """Do all of them, `workers` at a time, each in a process with one thread."""
    start = time.perf_counter()
    if workers == 1:
        for lane in lanes:
            _log(start, lane.run(setup))
        return
    # Spawned: a fork of a process whose torch has threads may hang.
    with ProcessPoolExecutor(workers, get_context("spawn"), prepare_process) as executor:
        futures = [executor.submit(lane.run, setup) for lane in lanes]
        try:
            for future in as_completed(futures):
                _log(start, future.result())
        except BaseException:
            executor.shutdown(cancel_futures=True)
            raise


def main(words: list[str] | None = None) -> None:
    """Measure what is missing, then write tables and pictures of all that is there."""
    options = arguments(words)
    prepare_process()
    if not options.report:
        setup = setup_of(options)
        for part in options.only or PARTS:
            for lanes in phases(setup, part):
                run_lanes(setup, lanes, options.workers)
    print(write(Store(options.output / FILE), options.output))


def _numbers(text: str | None, kind: Callable) -> list:
    return [kind(number) for number in text.split(",")] if text else []


def _log(start: float, what: str) -> None:
    print(f"[{time.perf_counter() - start:6.0f} s] {what}", flush=True)


if __name__ == "__main__":
    main()
