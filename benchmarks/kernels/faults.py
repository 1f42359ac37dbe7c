"""What fails on purpose: without a GPU this shows that a failure is a row and the rest goes on."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Iterator
from dataclasses import replace

from torch import Tensor

from benchmarks.kernels.candidates import Candidate, Inputs, on_a_gpu
from benchmarks.kernels.names import EINSUM
from benchmarks.kernels.run import Row, Run, Unit

WRONG = "wrong on purpose"
RAISES = "raises on purpose"
DIES = "dies on purpose"


def few() -> list[Candidate]:
    """The candidates of a GPU without some paths of ours: the interpreter needs a second each."""
    slow = [c for c in on_a_gpu() if c.path and (c.fp32 or c.path == "sequence")]
    return [c for c in on_a_gpu() if c.name not in {other.name for other in slow}]


def with_faults() -> list[Candidate]:
    """Few candidates, then one that is wrong, one that raises and one that ends the process."""
    right = few()
    einsum = next(c for c in right if c.name == EINSUM)

    def wrong(inputs: Inputs, y: Tensor) -> Tensor:
        return einsum.add(replace(inputs, weights=inputs.weights * 0.9), y)

    def raises(inputs: Inputs, y: Tensor) -> Tensor:
        raise RuntimeError("out of resources")

    def dies(inputs: Inputs, y: Tensor) -> Tensor:
        ctypes.string_at(0)
        return y

    bad = {WRONG: wrong, RAISES: raises, DIES: dies}
    return right + [Candidate(name, "mixture", add) for name, add in bad.items()]


def units(run: Run) -> Iterator[Unit]:
    """A unit that raises, one that ends the process, one that hangs, and one that is well."""
    yield "raises", lambda: _raises(run)
    yield "dies", lambda: _dies(run)
    yield "hangs", lambda: _hangs(run)
    yield "is well", lambda: iter([{"case": "is well", "ok": True}])


def _raises(run: Run) -> Iterator[Row]:
    yield {"case": "before the error", "ok": True}
    raise ValueError("on purpose")


def _dies(run: Run) -> Iterator[Row]:
    ctypes.string_at(0)
    yield {}


def _hangs(run: Run) -> Iterator[Row]:
    run.doing("sleeper")
    time.sleep(3600)
    yield {}
