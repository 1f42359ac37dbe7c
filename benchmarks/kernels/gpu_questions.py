"""Questions of kernels/README.md about our kernels: planes or one sum, blocks of 128 columns."""

from __future__ import annotations

import importlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from moelora_kernels.triton.tiles import Tile, default_tile, save_tuned, tile_key
from moelora_kernels.triton.tune import launcher

from benchmarks.kernels.gpu_checks import SHAPES, inputs_of, ours, outcome, wanted
from benchmarks.kernels.timing import timed

Row = dict[str, Any]
BF16 = torch.bfloat16


def planes(device: torch.device, rounds: int = 15) -> Iterator[Row]:
    """The shrink with its sum over d split into planes, as the rule has it, over the same in one
    piece.
    """
    # By its full name: the package's attribute `shrink` is the function.
    module = importlib.import_module("moelora_kernels.triton.shrink")
    for tokens in (16, 64, 512, 2048, 8192):
        launch = launcher("shrink", tokens, 128, BF16, device)

        def whole(launch=launch) -> object:
            with patch.object(module, "split_count", lambda programs, d, block, device: (1, d)):
                return launch("")

        timings = timed(
            {"planes": lambda launch=launch: launch("").sum(0), "whole": whole}, device, rounds
        )
        ratio, low, high = timings.ratio("planes", "whole")
        row = {
            "case": f"shrink T={tokens} 4096 → R=128",
            "measure": "planes over one sum",
            "ratio": ratio,
        }
        yield {
            **row,
            "ratio min": low,
            "ratio max": high,
            "microseconds": 1e6 * timings.median("planes"),
        }


def wide_blocks(device: torch.device, repeats: int = 20) -> Iterator[Row]:
    """Whether blocks of 128 columns give NaN (vllm #48590 reports it on sm_90), and the right
    numbers.
    """
    shape = SHAPES["training"]
    ids, values = inputs_of(shape, device, BF16)
    exact = wanted(shape, ids, values)
    with tempfile.TemporaryDirectory() as folder:
        for path in ("dense", "grouped"):
            table = Path(folder) / f"{path}.json"
            save_tuned(table, "", _wide(shape.rows, shape.offsets[-1], path))
            bad = 0
            for _ in range(repeats):
                got = outcome(ours(shape, ids, path, str(table)), values)
                errors = (
                    (got[key].double() - value).abs().max() / value.abs().max()
                    for key, value in exact.items()
                )
                bad += not all(float(error) <= 3e-2 for error in errors)
            row = {
                "check": "blocks of 128 columns",
                "case": "training",
                "path": path,
                "dtype": str(BF16),
            }
            yield {**row, "wrong of": f"{bad} of {repeats}", "ok": bad == 0}


def _wide(tokens: int, width: int, path: str) -> dict[str, Tile]:
    """A table whose expand writes 128 columns a block."""
    kernel = "expand" if path == "dense" else "expand_slots"
    held = tokens if path == "dense" else 64
    rank = width if path == "dense" else 16
    tile = default_tile(kernel, held, rank, BF16.itemsize)
    return {
        tile_key(kernel, held, rank, BF16): Tile(
            tile.BLOCK_T, tile.BLOCK_R, 128, 8, tile.num_stages
        )
    }
