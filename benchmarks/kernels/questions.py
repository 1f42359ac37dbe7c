"""What only a GPU answers and the dispatch hangs on: how fast thin products are, and what a launch
costs.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from benchmarks.kernels.bounds import Work
from benchmarks.kernels.run import Row, Run, Unit, failed, times
from benchmarks.kernels.timing import Call

RANKS = (128, 192, 256, 384, 512)
LAUNCHES = 1000


def units(run: Run) -> Iterator[Unit]:
    """What decides between cuBLAS and our products: thin products, gaps between launches."""
    sizes = ((256, 4096), (8192, 4096)) if not run.suite.interpreted else ((16, 32),)
    for tokens, features in sizes:
        yield (
            f"thin products T={tokens}",
            lambda tokens=tokens, features=features: thin_products(run, tokens, features),
        )
    yield "launch gaps", lambda: launches(run)


def thin_products(run: Run, tokens: int, features: int) -> Iterator[Row]:
    """The products of a dense path as cuBLAS has them: time and share of the bound.

    h = x Aᵀ and dA = hᵀ x to fp32, and y += g B in place: T·(d + R) + d·R elements each.
    """
    dtype = run.suite.dtype
    calls: dict[str, Call] = {}
    works = {}
    x = torch.randn(tokens, features, device=run.device).to(dtype)
    y = torch.zeros_like(x)
    for rank in RANKS if not run.suite.interpreted else (16,):
        h = torch.randn(tokens, rank, device=run.device).to(dtype)
        factor = torch.randn(rank, features, device=run.device).to(dtype)
        flops = 2 * tokens * rank * features
        operands = (tokens * (features + rank) + rank * features) * dtype.itemsize
        to_fp32 = 4 - dtype.itemsize
        shape = f"T={tokens} d={features} R={rank}"
        own = {
            f"x Aᵀ to fp32, {shape}": (
                lambda factor=factor: fp32_product(x, factor.T),
                operands + tokens * rank * to_fp32,
            ),
            f"x Aᵀ, {shape}": (lambda factor=factor: x @ factor.T, operands),
            f"y += g B, {shape}": (
                lambda h=h, factor=factor: y.addmm_(h, factor),
                operands + tokens * features * dtype.itemsize,
            ),
            f"hᵀ x to fp32, {shape}": (
                lambda h=h: fp32_product(h.T, x),
                operands + rank * features * to_fp32,
            ),
        }
        for name, (call, moved) in own.items():
            calls[name] = call
            works[name] = Work(moved, flops)
    timings = run.timed(calls)
    for name in timings.seconds:
        seconds = timings.median(name)
        ideal = works[name].seconds(run.peaks)
        row = {"case": name, "measure": "thin product", **times(timings, name)}
        row |= {"TFLOP/s": works[name].flops / seconds / 1e12}
        yield {
            **row,
            "calculated bound microseconds": 1e6 * ideal,
            "share of bound": ideal / seconds,
        }
    yield from failed(timings.failed, case=f"T={tokens}", measure="thin product")


def fp32_product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a b, not rounded to their 16 bits; only CUDA has such a product."""
    if a.device.type == "cuda" and a.dtype.itemsize == 2:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


def launches(run: Run) -> Iterator[Row]:
    """Microseconds from one launch of next to nothing to the next, eager and in a graph."""
    count = LAUNCHES if not run.suite.interpreted else 10
    one = torch.zeros(1, device=run.device)

    def many() -> None:
        for _ in range(count):
            one.add_(1.0)

    waits: dict[str, Call] = {"eager": many, "in a graph": run.captured(many)}
    timings = run.timed(waits, hidden=False).divided_by(count)
    for name in timings.seconds:
        yield {"case": name, "measure": "launch gap", **times(timings, name)}
    yield from failed(timings.failed, case="launches", measure="launch gap")
