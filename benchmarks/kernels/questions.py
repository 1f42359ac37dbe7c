"""What only a GPU answers: how efficient thin products are there, and what a launch costs."""

from __future__ import annotations

import torch

from benchmarks.kernels.bounds import Work
from benchmarks.kernels.measures import Row, Run
from benchmarks.kernels.timing import Call, captured, timed

TOKENS = 8192
FEATURES = 4096
RANKS = (128, 192, 256, 384, 512)
LAUNCHES = 1000


def questions(run: Run) -> list[Row]:
    """Both of them; slot passes against pair rows are candidates of the other measures."""
    if not run.is_gpu:
        return [
            {"case": "thin products, launches", "measure": "questions", "not run": "needs a GPU"}
        ]
    return thin_products(run) + launches(run)


def thin_products(run: Run, tokens: int = TOKENS, features: int = FEATURES) -> list[Row]:
    """x [T, d] @ [d, N] and back, h [T, N] @ [N, d]: time and share of the bound, T·(d + N) + d·N
    elements.
    """
    dtype = run.suite.dtype
    rows = []
    x = torch.randn(tokens, features, device=run.device).to(dtype)
    calls: dict[str, Call] = {}
    works = {}
    for rank in RANKS:
        h = torch.randn(tokens, rank, device=run.device).to(dtype)
        factor = torch.randn(rank, features, device=run.device).to(dtype)
        moved = (tokens * (features + rank) + rank * features) * dtype.itemsize
        calls[f"[{tokens}, {features}] @ [{features}, {rank}]"] = lambda factor=factor: x @ factor.T
        calls[f"[{tokens}, {rank}] @ [{rank}, {features}]"] = lambda h=h, factor=factor: h @ factor
        for name in list(calls)[-2:]:
            works[name] = Work(moved, 2 * tokens * rank * features)
    timings = timed(calls, run.device, run.suite.rounds)
    for name, work in works.items():
        seconds = timings.median(name)
        ideal = work.seconds(run.peaks)
        row = {"case": name, "measure": "thin product", "microseconds": 1e6 * seconds}
        row |= {"TFLOP/s": work.flops / seconds / 1e12, "bound microseconds": 1e6 * ideal}
        rows.append({**row, "share of bound": ideal / seconds})
    return rows


def launches(run: Run, count: int = LAUNCHES) -> list[Row]:
    """Microseconds from one launch of next to nothing to the next, eager and in a graph."""
    one = torch.zeros(1, device=run.device)

    def many() -> None:
        for _ in range(count):
            one.add_(1.0)

    calls: dict[str, Call] = {"eager": many, "in a graph": captured(many)}
    timings = timed(calls, run.device, run.suite.rounds)
    return [
        {"case": name, "measure": "launch gap", "microseconds": 1e6 * timings.median(name) / count}
        for name in calls
    ]
