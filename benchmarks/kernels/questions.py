"""What only a GPU answers: how fast thin products are, what a launch costs, planes or one sum, and
blocks of 128 columns.
"""

from __future__ import annotations

import importlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

import torch
from moelora_kernels.triton.tiles import Tile, default_tile, save_tuned, tile_key
from moelora_kernels.triton.tune import launcher

from benchmarks.kernels.bounds import Work
from benchmarks.kernels.gpu_checks import SHAPES, SMALL, error_of, inputs_of, ours, outcome, wanted
from benchmarks.kernels.run import Row, Run, Unit, failed, spread, times
from benchmarks.kernels.timing import Call

RANKS = (128, 192, 256, 384, 512)
LAUNCHES = 1000


def dispatch(run: Run) -> Iterator[Unit]:
    """What decides between cuBLAS and our products: thin products, gaps between launches."""
    sizes = ((256, 4096), (8192, 4096)) if not run.suite.tiny else ((16, 32),)
    for tokens, features in sizes:
        yield (
            f"thin products T={tokens}",
            lambda tokens=tokens, features=features: thin_products(run, tokens, features),
        )
    yield "launch gaps", lambda: launches(run)


def kernels(run: Run) -> Iterator[Unit]:
    """Of our own kernels: planes or one sum, and blocks of 128 columns."""
    for tokens in (16, 64, 512, 2048, 8192) if not run.suite.tiny else (16,):
        yield f"planes T={tokens}", lambda tokens=tokens: planes(run, tokens)
    for path in ("dense", "grouped"):
        yield f"blocks of 128 columns, {path}", lambda path=path: wide_blocks(run, path)


def thin_products(run: Run, tokens: int, features: int) -> Iterator[Row]:
    """The products of a dense path as cuBLAS has them: time and share of the bound.

    h = x Aᵀ and dA = hᵀ x to fp32, and y += g B in place: T·(d + R) + d·R elements each.
    """
    dtype = run.suite.dtype
    calls: dict[str, Call] = {}
    works = {}
    x = torch.randn(tokens, features, device=run.device).to(dtype)
    y = torch.zeros_like(x)
    for rank in RANKS if not run.suite.tiny else (16,):
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
    count = LAUNCHES if not run.suite.tiny else 10
    one = torch.zeros(1, device=run.device)

    def many() -> None:
        for _ in range(count):
            one.add_(1.0)

    waits: dict[str, Call] = {"eager": many, "in a graph": run.captured(many)}
    timings = run.timed(waits, hidden=False).divided_by(count)
    for name in timings.seconds:
        yield {"case": name, "measure": "launch gap", **times(timings, name)}
    yield from failed(timings.failed, case="launches", measure="launch gap")


def planes(run: Run, tokens: int) -> Iterator[Row]:
    """The shrink with its sum over d split into planes, as the rule has it, over the same in one
    piece.
    """
    # By its full name: the package's attribute `shrink` is the function.
    module = importlib.import_module("moelora_kernels.triton.shrink")
    rank, features = (16, 64) if run.suite.tiny else (128, 4096)
    launch = launcher("shrink", tokens, rank, run.suite.dtype, run.device, features)

    def whole() -> object:
        with patch.object(module, "split_count", lambda programs, d, block, device: (1, d)):
            return launch("")

    timings = run.timed({"planes": lambda: launch(""), "whole": whole})
    columns = {"case": f"shrink T={tokens} {features} → R={rank}", "measure": "planes over one sum"}
    if {"planes", "whole"} <= timings.seconds.keys():
        ratio = timings.ratio("planes", "whole")
        yield {**columns, **times(timings, "planes"), **spread("ratio", ratio)}
    yield from failed(timings.failed, **columns)


def wide_blocks(run: Run, path: str, repeats: int = 20) -> Iterator[Row]:
    """Whether blocks of 128 columns give NaN (vllm #48590 reports it on sm_90), and the right
    numbers.
    """
    name, shape = ("small", SMALL["small"]) if run.suite.tiny else ("training", SHAPES["training"])
    repeats = 1 if run.suite.tiny else repeats
    ids, values = inputs_of(shape, run.device, run.suite.dtype)
    exact = wanted(shape, ids, values)
    with tempfile.TemporaryDirectory() as folder:
        tiles = Path(folder) / f"{path}.json"
        save_tuned(tiles, "", _wide(shape.rows, shape.offsets[-1], path, run.suite.dtype))
        bad = 0
        for _ in range(repeats):
            got = outcome(ours(shape, ids, path, str(tiles)), values)
            errors = [error_of(got[key], value) for key, value in exact.items()]
            bad += not all(error <= 3e-2 for error in errors)
    row = {"check": "blocks of 128 columns", "case": name, "path": path}
    yield {**row, "wrong of": f"{bad} of {repeats}", "ok": bad == 0}


def _wide(tokens: int, width: int, path: str, dtype: torch.dtype) -> dict[str, Tile]:
    """A table whose expand writes 128 columns a block."""
    kernel = "expand" if path == "dense" else "expand_slots"
    held = tokens if path == "dense" else 64
    rank = width if path == "dense" else 16
    tile = default_tile(kernel, held, rank, dtype.itemsize)
    key = tile_key(kernel, held, rank, dtype)
    return {key: Tile(tile.BLOCK_T, tile.BLOCK_R, 128, 8, tile.num_stages)}
