"""The parts of a run, one call each for a seed, done in processes side by side and the timing
alone.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from typing import Any

import torch
from transformers.utils import logging

from benchmarks.routing.experts import train_experts, train_joint
from benchmarks.routing.gates import run_bare, run_gates
from benchmarks.routing.latency import run_latency
from benchmarks.routing.mixtures import run_harder, run_mixtures
from benchmarks.routing.outside import run_outside
from benchmarks.routing.replay import run_replay
from benchmarks.routing.selector import run_selector
from benchmarks.routing.settings import Settings

# What can be run alone, by what it needs.
ALONE = {"gates": ("gates", "bare"), "harder": ("experts", "harder")}
Results = dict[str, list[dict[str, Any]]]


@dataclass(frozen=True)
class Part:
    """One call for one seed, which may wait for another part of that seed."""

    name: str
    seed: int
    call: Callable[..., dict[str, Any]]
    arguments: tuple[Any, ...] = ()
    after: str | None = None


def parts_of(settings: Settings, only: str | None = None) -> list[Part]:
    """All parts but the timing, in the order in which they are begun: what others wait for, then
    long before short.
    """
    rank = settings.sizes.rank
    many = len(settings.tasks) * settings.sizes.rank
    seeds = range(settings.seeds)
    kinds = [
        ("experts", train_experts, (), None),
        ("selector", run_selector, (), None),
        ("mixtures", run_mixtures, (), "experts"),
        ("joint, total", train_joint, (many,), None),
        ("joint, active", train_joint, (rank,), None),
        *([("harder", run_harder, (), "experts")] if settings.harder else []),
        ("gates", run_gates, (), None),
        ("bare", run_bare, (), None),
        ("replay", run_replay, (), None),
        *([("outside", run_outside, (), None)] if settings.outside_train else []),
    ]
    if only is not None:
        kinds = [kind for kind in kinds if kind[0] in ALONE[only]]
    parts = [
        Part(name, seed, call, words, after) for name, call, words, after in kinds for seed in seeds
    ]
    return [
        part
        for part in parts
        if part.name != "selector" or part.seed < settings.sizes.selector_seeds
    ]


def run_parts(settings: Settings, workers: int, only: str | None = None) -> Results:
    """What every part found, by its name, one a seed; "selector" has its first seeds alone,
    "latency" one.

    only: a key of `ALONE`. workers: processes side by side, each with one thread; 1 does all of it
    in this one.
    """
    waiting = parts_of(settings, only)
    running = {}
    found = {}
    start = time.perf_counter()
    with _executor(workers) as executor:
        while waiting or running:
            for part in [p for p in waiting if p.after is None or (p.after, p.seed) in found]:
                # No more than can run: what becomes free to begin later may go before the rest.
                if len(running) >= workers:
                    break
                waiting.remove(part)
                running[executor.submit(timed, part.call, settings, part.seed, *part.arguments)] = (
                    part
                )
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                part = running.pop(future)
                found[part.name, part.seed] = future.result()
                _log(start, f"{part.name}, seed {part.seed}", found[part.name, part.seed])
        timing = {}
        if only is None:
            # In a worker of its own, with nothing beside it.
            timing["latency"] = [executor.submit(timed, run_latency, settings, 0).result()]
            _log(start, "latency", timing["latency"][0])
    names = dict.fromkeys(name for name, _ in found)
    seeds = range(settings.seeds)
    return {n: [found[n, s] for s in seeds if (n, s) in found] for n in names} | timing


def timed(call: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
    """What `call` gives, and the seconds that it took, by the clock and of the processor."""
    start = time.perf_counter()
    used = time.process_time()
    found = call(*arguments)
    return found | {"wall": time.perf_counter() - start, "processor": time.process_time() - used}


def prepare_process() -> None:
    """One thread, and no bars and warnings between the lines of progress."""
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")


class _Here(Executor):
    """An executor that does everything at once, in this process."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_result(fn(*args, **kwargs))
        return future


@contextmanager
def _executor(workers: int) -> Iterator[Executor]:
    if workers == 1:
        yield _Here()
        return
    # Spawned: a fork of a process whose torch has threads may hang.
    executor = ProcessPoolExecutor(workers, get_context("spawn"), prepare_process)
    try:
        yield executor
    finally:
        executor.shutdown(cancel_futures=True)


def _log(start: float, what: str, found: dict[str, Any]) -> None:
    # Beside other work on the machine the two differ.
    seconds = f"{found['wall']:.0f} s, {found['processor']:.0f} of the processor"
    print(f"[{time.perf_counter() - start:6.0f} s] {what}: {seconds}", flush=True)
