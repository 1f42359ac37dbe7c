"""Times in turns on a CPU or a GPU, CUDA graphs, and peak memory."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import torch

from benchmarks.harness import Timings

Call = Callable[[], object]
# One measurement lasts at least half of this, however wrong the first guess was.
AIM = 2e-3
# The GPU waits so long (in cycles) while the first calls are queued, or their launches would be
# measured.
HEAD_START = 1_000_000


def timed(calls: dict[str, Call], device: torch.device, rounds: int) -> Timings:
    """Seconds of every call, each once a round as the mean of as many repeats as fill 1 ms or more.

    Before each measurement the call runs once uncounted: the cache and the allocator are as it
    leaves them, not as the candidate before it does.
    """
    measure = _on_gpu if device.type == "cuda" else _on_cpu
    repeats = {name: _repeats(call, device) for name, call in calls.items()}
    timings = Timings({name: [] for name in calls})
    for _ in range(rounds):
        for name, call in calls.items():
            timings.seconds[name].append(measure(call, repeats[name]))
    return timings


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


def _on_cpu(call: Call, count: int) -> float:
    call()
    start = time.perf_counter()
    for _ in range(count):
        call()
    return (time.perf_counter() - start) / count


def _on_gpu(call: Call, count: int) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(HEAD_START)
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
