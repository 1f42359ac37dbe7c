"""Tuned tiles: all compiled in several processes, then timed in one until the deadline, each
checked and the table saved case by case.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence

import torch
from moelora_kernels.triton import tune

from benchmarks.kernels.run import Row, Run, Unit

TINY_FEATURES = 32
TINY = (("shrink", 17, 16), ("expand_slots", 17, 16))


def compiled(run: Run) -> Iterator[Unit]:
    """Every tile of every case runs once, which compiles it."""
    for case in _cases(run):
        yield f"{case}", lambda case=case: _compile(run, case)


def timed(run: Run) -> Iterator[Unit]:
    """The fastest right tile of every case, in the table as soon as it is known."""
    for case in _cases(run):
        yield f"{case}", lambda case=case: _tune(run, case)


def _cases(run: Run) -> Sequence[tune.TileCase]:
    return TINY if run.suite.interpreted else tune.CASES


def _trials(
    run: Run, case: tune.TileCase, seconds: Callable[[Callable[[], object]], float]
) -> Iterator[tune.Trial]:
    features = TINY_FEATURES if run.suite.interpreted else tune.D
    return tune.trials(case, run.suite.dtype, run.device, seconds, run.attempt, features)


def _compile(run: Run, case: tune.TileCase) -> Iterator[Row]:
    def once(launch: Callable[[], object]) -> float:
        launch()
        return 0.0

    tried = list(_trials(run, case, once))
    refused = sum(trial.why_not is not None for trial in tried)
    columns = {"case": tune.key_of(case, run.suite.dtype), "measure": "tiles compiled"}
    yield {**columns, "tiles": len(tried), "do not run": refused}


def _tune(run: Run, case: tune.TileCase) -> Iterator[Row]:
    assert run.out is not None
    gpu = torch.cuda.get_device_name(run.device) if run.is_gpu else "interpreter"
    path = run.out / f"tiles_{gpu.replace(' ', '-').lower()}.json"
    seconds = tune.seconds_on_gpu if run.is_gpu else tune.seconds_by_the_clock
    tried: list[tune.Trial] = []
    for trial in _trials(run, case, seconds):
        tried.append(trial)
        if time.time() > run.deadline:
            break
    key = tune.key_of(case, run.suite.dtype)
    best = tune.fastest(tried)
    if best is not None:
        tune.keep(path, gpu, key, best.tile)
        columns = {"case": key, "measure": "tile", "candidate": tune.shown(best.tile)}
        columns |= {"tiles": len(tried), "microseconds": 1e6 * best.seconds}
        default = tried[0].seconds
        yield {**columns, "over default": best.seconds / default if default else None}
    for trial in tried:
        if trial.why_not:
            columns = {"case": key, "measure": "tile", "candidate": tune.shown(trial.tile)}
            yield {**columns, "failed" if trial.wrong else "not run": trial.why_not}
