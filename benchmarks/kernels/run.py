"""What every measure is given, and how it goes on where a candidate cannot."""

from __future__ import annotations

import math
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from moelora_kernels import Shape, choose_backend

from benchmarks.kernels.bounds import Peaks, peaks_of
from benchmarks.kernels.candidates import Candidate, Inputs, candidates, make_inputs
from benchmarks.kernels.cases import Case, Suite
from benchmarks.kernels.names import ours
from benchmarks.kernels.timing import Call, Measured, captured, timed

Row = dict[str, Any]
# A name, and what finds the rows of what is called so.
Unit = tuple[str, Callable[[], Iterable[Row]]]
CPU_BYTES = 2 * 2**30


class DeviceLost(BaseException):
    """After an illegal access nothing runs on the device any more: only a new process helps."""


@dataclass
class Run:
    """One run.

    doing: is told which candidate begins. avoid: candidates that ended a process before.
    deadline: when to stop, in seconds of the epoch. asked: the candidates to measure.
    """

    suite: Suite
    device: torch.device
    out: Path | None = None
    deadline: float = math.inf
    doing: Callable[[str], None] = lambda name: None
    avoid: set[str] = field(default_factory=set)
    asked: Callable[[], list[Candidate]] = candidates

    @property
    def is_gpu(self) -> bool:
        """Whether times are the GPU's."""
        return self.device.type == "cuda"

    @cached_property
    def peaks(self) -> Peaks:
        """How fast the device could be."""
        return peaks_of(self.device, self.suite.dtype, self.suite.tiny)[0]

    @property
    def default(self) -> str:
        """The candidate that is what a model runs on this device: its factors are fp32."""
        shape = Shape(1, 1, 8, 2, 128, self.suite.dtype, self.device.type)
        return ours(choose_backend(shape), fp32=self.suite.dtype.itemsize == 2)

    def inputs(self, case: Case, seed: int = 0) -> Inputs:
        """The case's tensors on this device."""
        return make_inputs(case, self.device, self.suite.dtype, seed)

    def free_bytes(self) -> float:
        """How much memory a candidate may take."""
        if not self.is_gpu:
            return CPU_BYTES
        torch.cuda.empty_cache()
        return 0.8 * torch.cuda.mem_get_info()[0]

    def captured(self, call: Call) -> Call:
        """The replay of a CUDA graph of the call; the call itself where there is no GPU."""
        return captured(call) if self.is_gpu else call

    def timed(self, calls: dict[str, Call], *, hidden: bool = True, more: int = 1) -> Measured:
        """Times in turns, and why some calls have none; hidden: without the host's launches."""
        rounds = more * self.suite.rounds
        return timed(calls, self.device, rounds, hidden=hidden, attempt=self.attempt)

    def attempt(self, candidate: str, call: Call) -> str | None:
        """What the candidate's call died of, or None.

        Raises: DeviceLost where nothing can run after it in this process.
        """
        if candidate in self.avoid:
            return "ended the process when it was tried before"
        self.doing(candidate)
        try:
            call()
            if self.is_gpu:
                torch.cuda.synchronize(self.device)
        except Exception as error:
            traceback.print_exc()
            self.check_alive(error)
            return reason(error)
        return None

    def check_alive(self, error: Exception) -> None:
        """Raise DeviceLost unless the device still answers after an error."""
        if not self.is_gpu:
            return
        try:
            torch.cuda.synchronize(self.device)
            torch.cuda.empty_cache()
        except Exception:
            raise DeviceLost(reason(error)) from error


def reason(error: BaseException) -> str:
    """An error in a line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]


def spread(name: str, ratio: tuple[float, float, float]) -> Row:
    """A ratio of `Timings` as three columns."""
    return dict(zip((name, f"{name} min", f"{name} max"), ratio, strict=True))


def times(timings: Measured, name: str) -> Row:
    """The columns of one candidate's times."""
    row = {
        "microseconds": 1e6 * timings.median(name),
        "microseconds min": 1e6 * min(timings.seconds[name]),
    }
    return row | ({"host microseconds": 1e6 * timings.host[name]} if name in timings.host else {})


def failed(names: dict[str, str], **columns: Any) -> list[Row]:
    """A row for each candidate that failed, by name and reason."""
    return [{**columns, "candidate": name, "failed": why} for name, why in names.items()]
