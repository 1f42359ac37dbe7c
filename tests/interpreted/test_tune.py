"""Tuning: the fastest tile is kept, written, and used where its table is named; a wrong name says
which there are.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from moelora_kernels.triton import tiles
from moelora_kernels.triton.tiles import (
    KERNELS,
    Tile,
    default_tile,
    load_tuned,
    save_tuned,
    tile_for,
    tile_key,
)
from moelora_kernels.triton.tune import neighbours, tune

from tests.kernels.cases import CASES, assert_close, expected, make, mixture, run

CPU = torch.device("cpu")
FP32 = torch.float32


def test_the_fastest_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moelora_kernels.triton.tune.D", 32)
    calls: list[int] = []

    def seconds(launch: Callable[[], object]) -> float:
        launch()
        calls.append(len(calls))
        return 1.0 / len(calls)  # the last one tried

    cases = [(kernel, 17, 16 if kernel == "expand_slots" else 32) for kernel in KERNELS]
    table = tune(cases, [FP32], CPU, seconds, report=lambda line: None)
    assert len(table) == len(KERNELS)
    for kernel, _, width in cases:
        held = 16 if kernel == "expand_slots" else 17
        key = tile_key(kernel, held, width, FP32)
        assert table[key] == neighbours(default_tile(kernel, held, width, 4))[-1]


def test_a_named_table_is_used(tmp_path: Path) -> None:
    case = CASES["plain"]
    ids, inputs = make(case, FP32)
    path = tmp_path / "mine.json"
    save_tuned(path, "a chip", {tile_key("shrink", 6, 12, FP32): Tile(32, 32, 16, 2, 1)})
    assert load_tuned(str(path)) == {"shrink T=16 R=16 float32": Tile(32, 32, 16, 2, 1)}
    assert tile_for("shrink", 6, 12, FP32, str(path)) == Tile(32, 32, 16, 2, 1)
    assert tile_for("expand", 6, 12, FP32, str(path)) == default_tile("expand", 6, 12, 4)
    actual = run(mixture(case, ids, path="dense", backend="triton", tiles=str(path)), inputs)
    assert_close(actual, expected(case, ids, inputs), FP32)


def test_a_table_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "TUNED", tmp_path)
    save_tuned(tmp_path / "nvidia-x.json", "x", {})
    with pytest.raises(
        ValueError, match=r"tiles='h300': there is no h300.json: .*\(nvidia-x\).*tune"
    ):
        load_tuned("h300")
    (tmp_path / "broken.json").write_text('{"tiles": {"shrink": {"BLOCK": 1}}}')
    with pytest.raises(ValueError, match="broken.json is not a table of tiles"):
        load_tuned("broken")
