"""Questions about our own kernels, which only a GPU answers: planes or one sum, and blocks of 128
columns.
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

from benchmarks.kernels.gpu_checks import SHAPES, SMALL, error_of, inputs_of, ours, outcome, wanted
from benchmarks.kernels.run import Row, Run, Unit, failed, spread, times


def units(run: Run) -> Iterator[Unit]:
    """Of our own kernels: planes or one sum, and blocks of 128 columns."""
    for tokens in (16, 64, 512, 2048, 8192) if not run.suite.interpreted else (16,):
        yield f"planes T={tokens}", lambda tokens=tokens: planes(run, tokens)
    for path in ("dense", "grouped"):
        yield f"blocks of 128 columns, {path}", lambda path=path: wide_blocks(run, path)


def planes(run: Run, tokens: int) -> Iterator[Row]:
    """The shrink with its sum over d split into planes, as the rule has it, over the same in one
    piece.
    """
    # By its full name: the package's attribute `shrink` is the function.
    module = importlib.import_module("moelora_kernels.triton.shrink")
    rank, features = (16, 64) if run.suite.interpreted else (128, 4096)
    launch = launcher("shrink", tokens, rank, run.suite.dtype, run.device, features)

    def whole() -> object:
        with patch.object(module, "split_count", lambda programs, d, *rest: (1, d)):
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
    name, shape = (
        ("small", SMALL["small"]) if run.suite.interpreted else ("training", SHAPES["training"])
    )
    repeats = 1 if run.suite.interpreted else repeats
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
