"""Tuning: the fastest tile is kept, written, and used where its table is named; a wrong name says
which there are.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from moelora_kernels.triton import tiles
from moelora_kernels.triton import tune as tuning
from moelora_kernels.triton.tiles import (
    Tile,
    default_tile,
    load_tuned,
    save_tuned,
    tile_for,
    tile_key,
)
from moelora_kernels.triton.tune import CASES as CASES_TO_TUNE
from moelora_kernels.triton.tune import FIXED, fastest, keep, key_of, neighbours, trials, tune

from tests.kernels.cases import CASES, assert_close, expected, make, mixture, run

CPU = torch.device("cpu")
FP32 = torch.float32


def last_is_fastest() -> Callable[[Callable[[], object]], float]:
    calls: list[int] = []

    def seconds(launch: Callable[[], object]) -> float:
        launch()
        calls.append(len(calls))
        return 1.0 / len(calls)

    return seconds


def test_the_fastest_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    kernels = dict.fromkeys(kernel for kernel, _, _ in CASES_TO_TUNE)
    cases = [(kernel, 17, 16 if kernel == "expand_slots" else 32) for kernel in kernels]
    reported: list[str] = []
    found = partial(keep, path, "a chip")
    tune(cases, [FP32], CPU, last_is_fastest(), found, reported.append, d=32)
    table = load_tuned(str(path))
    assert len(table) == len(kernels)
    for case in cases:
        held = 16 if case[0] == "expand_slots" else 17
        key = tile_key(case[0], held, case[2], FP32)
        assert key == key_of(case, FP32)
        default = default_tile(case[0], held, case[2], 4)
        fixed = FIXED.get(case[0], "BLOCK_T")
        tried = [t for t in neighbours(default) if getattr(t, fixed) == getattr(default, fixed)]
        assert table[key] == tried[-1]
    assert not [line for line in reported if "left out" in line]


def test_a_wrong_tile_and_one_that_dies_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    right = tuning.launcher

    def faulty(*case: Any) -> Callable[[str], Any]:
        launch = right(*case)
        calls: list[str] = []

        def launched(table: str) -> Any:
            calls.append(table)
            tiles = list(dict.fromkeys(calls))
            if len(tiles) == 4:
                raise RuntimeError("PTXASError")
            return launch(table) * (1.5 if len(tiles) == 3 else 1.0)

        return launched

    monkeypatch.setattr(tuning, "launcher", faulty)
    tried = list(trials(("shrink", 17, 32), FP32, CPU, last_is_fastest(), d=32))
    assert tried[1].wrong and "off by" in (tried[1].why_not or "")
    assert not tried[2].wrong and "PTXASError" in (tried[2].why_not or "")
    assert fastest(tried) == tried[-1] and fastest(tried[1:3]) is None


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
