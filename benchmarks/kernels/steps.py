"""The steps of `make gpu` as data, in their order: what each runs, for how long at most, and in how
many processes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

ROOM = "benchmarks.kernels"
# How much longer a step may take on a busy machine without a GPU.
SLOW = 6
# Its candidates fail on purpose where there is no GPU.
LINEARS = "linears"


@dataclass(frozen=True)
class Step:
    """One subprocess, or several that share its units.

    units: module and function that yield its units. limit: seconds for all of it. stall: seconds
    without a line after which it is taken to hang. processes: at most so many at once.
    """

    name: str
    units: str
    limit: float
    stall: float = 40.0
    processes: int = 1


# At most 540 s in all: the limits add up to more, since hardly any step needs its own.
STEPS = (
    Step("smoke", "gpu_checks:smoke", 60, processes=4),
    Step("what decides the dispatch", "questions:units", 45),
    Step("right in the dtype that is timed", "gpu_checks:first", 90, processes=12),
    Step(LINEARS, "measures:table", 120),
    Step("a decoder layer", "models:layer", 60),
    Step("a model", "models:model", 60),
    Step("a model, compiled", "models:compiled", 100, stall=80),
    Step("right in other dtypes", "gpu_checks:others", 60, processes=12),
    Step("memory", "measures:memory", 30),
    Step("growth with E", "measures:growth", 40),
    Step("mixtures alone", "measures:alone", 30),
    Step("decoding linears", "measures:decode", 45),
    Step("questions about the kernels", "kernel_questions:units", 45),
    Step("tiles, compiled", "tiles:compiled", 60, processes=12),
    Step("tiles, timed", "tiles:timed", 300),
)
# What goes wrong in them goes wrong on purpose.
FAULTS = Step("fails on purpose", "faults:units", 300, stall=3)


def steps_for(tiny: bool) -> tuple[Step, ...]:
    """All of them; a run without a GPU also fails on purpose."""
    if not tiny:
        return STEPS
    return (*(replace(step, limit=SLOW * step.limit) for step in STEPS), FAULTS)


def named(name: str) -> Step:
    """The step of this name."""
    return next(step for step in (*STEPS, FAULTS) if step.name == name)
