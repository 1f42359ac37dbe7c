"""Times in turns on a CPU or a GPU, CUDA graphs, and peak memory."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from benchmarks.harness import Timings

Call = Callable[[], object]
# Calls it, and says what it died of, or None.
Attempt = Callable[[str, Call], str | None]
# One measurement lasts at least half of this, however wrong the first guess was.
AIM = 2e-3
# The GPU waits (in cycles) while calls are queued, or their launches would be measured: so long at
# least and at most, and in between as the host needs.
HEAD_START = 1_000_000
LONGEST_START = 100_000_000
CYCLES_A_SECOND = 2.4e9


@dataclass
class Measured(Timings):
    """Timings; by name also why a call has none, and the seconds that the host needs to queue one.

    On a GPU, where the host needs longer than the call lasts, eager use is bound by the host.
    """

    failed: dict[str, str] = field(default_factory=dict)
    host: dict[str, float] = field(default_factory=dict)

    def divided_by(self, count: int) -> Measured:
        """The same for one of `count` things that each call did."""
        host = {name: seconds / count for name, seconds in self.host.items()}
        return Measured(super().divided_by(count).seconds, self.failed, host)


def plain_attempt(name: str, call: Call) -> str | None:
    """Where an error is to be seen and not reported."""
    call()
    return None


def timed(
    calls: dict[str, Call],
    device: torch.device,
    rounds: int,
    *,
    hidden: bool = True,
    attempt: Attempt = plain_attempt,
) -> Measured:
    """Seconds of every call, each once a round as the mean of as many repeats as fill 1 ms or more.

    Before each measurement the call runs once uncounted: the cache and the allocator are as it
    leaves them, not as the candidate before it does.

    Args:
        calls: what to time, by name.
        device: where it runs.
        rounds: how often each is measured.
        hidden: on a GPU, its own time, the host's launches hidden; else what a user waits for.
        attempt: makes a call that may fail; one that does is left out and named in `failed`.
    """
    on_gpu = device.type == "cuda"
    measured = Measured()
    repeats: dict[str, int] = {}

    def prepare(name: str, call: Call) -> None:
        repeats[name] = _repeats(call, device)
        if on_gpu:
            measured.host[name] = _host_seconds(call, device)

    def measure(name: str, call: Call) -> None:
        if on_gpu and hidden:
            seconds = _on_gpu(call, repeats[name], measured.host[name])
        else:
            seconds = _by_the_clock(call, repeats[name], device)
        measured.seconds.setdefault(name, []).append(seconds)

    for step in (prepare, *[measure] * rounds):
        for name, call in calls.items():
            if name in measured.failed:
                continue
            why = attempt(name, lambda name=name, call=call, step=step: step(name, call))
            if why is not None:
                measured.failed[name] = why
                measured.seconds.pop(name, None)
    return measured


def captured(call: Call) -> Call:
    """The replay of a CUDA graph of the call."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        # Kept, so that the graph's memory is not given to what comes after it.
        result = call()

    def replay() -> object:
        graph.replay()
        return result

    return replay


def peak_bytes(call: Call) -> int:
    """The most GPU memory that a call holds above what there was before it."""
    call()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _repeats(call: Call, device: torch.device) -> int:
    """How many calls fill AIM; those before compile and warm up."""
    for _ in range(2 if device.type == "cuda" else 1):
        call()
    _wait(device)
    start = time.perf_counter()
    call()
    _wait(device)
    return max(1, math.ceil(AIM / (time.perf_counter() - start)))


def _host_seconds(call: Call, device: torch.device) -> float:
    """The least of three: what the host is busy with until the call is queued."""
    seconds = []
    for _ in range(3):
        _wait(device)
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    _wait(device)
    return min(seconds)


def _by_the_clock(call: Call, count: int, device: torch.device) -> float:
    call()
    _wait(device)
    start = time.perf_counter()
    for _ in range(count):
        call()
    _wait(device)
    return (time.perf_counter() - start) / count


def _on_gpu(call: Call, count: int, host: float) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    cycles = (count + 1) * host * CYCLES_A_SECOND
    torch.cuda._sleep(int(min(max(cycles, HEAD_START), LONGEST_START)))
    call()
    start.record()
    for _ in range(count):
        call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / count


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
