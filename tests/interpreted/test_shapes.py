"""Shapes that need more than one tile, split or pass in some dimension, against the specification
in float64.
"""

from __future__ import annotations

import sys

import pytest
import torch
from moelora_kernels import PATHS
from moelora_kernels.triton.tiles import Tile, columns_at_once, splits_in_cache, with_wide_rows

from tests.kernels.cases import DTYPES, Case, assert_close, expected, make, mixture, run, with_ranks

# Each with its reason.
LARGE = {
    "two tiles of tokens, ranks and features": Case(
        rows=70, ranks=(40, 40, 60), d_in=72, d_out=136
    ),
    "d is split, its planes summed": Case(rows=3, ranks=(4, 4), d_in=1024, d_out=520),
    "T is split for the weights' gradients": Case(
        rows=5, tokens_per_row=104, ranks=(2, 2), num_slots=1, d_in=8, d_out=8
    ),
    "ranks 1 to 256 in one mixture": with_ranks((1, 4, 8, 12, 48, 96, 256), rows=9),
    "rows longer than a tile": Case(rows=2, tokens_per_row=40, ranks=(3, 8), d_in=40),
    "an expert with more slots than a tile": Case(rows=90, ranks=(4, 4), ids="one", num_slots=1),
    "a d that is not a multiple of 8": Case(d_in=41, d_out=67),
}


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", LARGE.values(), ids=LARGE.keys())
def test_large_shapes(case: Case, dtype: torch.dtype, path: str) -> None:
    ids, inputs = make(case, dtype)
    actual = run(mixture(case, ids, path=path, backend="triton"), inputs)
    # A sum of 1024 random terms is off by more roundings of its size than one of 16.
    assert_close(actual, expected(case, ids, inputs), dtype, 1e-5)


@pytest.mark.parametrize("path", PATHS)
def test_a_thousand_experts(path: str) -> None:
    case = Case(rows=8, ranks=(1,) * 1024, num_slots=2, d_in=8, d_out=8)
    ids, inputs = make(case, torch.float32)
    actual = run(mixture(case, ids, path=path, backend="triton"), inputs)
    assert_close(actual, expected(case, ids, inputs), torch.float32)


@pytest.mark.parametrize("path", ["grouped", "sequence"])
def test_more_than_the_cache_holds(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Columns in parts, each of all slots; x in parts of d, each for all slots."""
    monkeypatch.setattr("moelora_kernels.triton.tiles.CACHED", 1 << 12)
    case = Case(rows=9, ranks=(2, 4, 3), num_slots=3, d_in=512, d_out=250)
    ids, inputs = make(case, torch.float32)
    assert columns_at_once(9, 250, 4, 64) == 128 and columns_at_once(9, 9, 4, 64) == 9
    assert splits_in_cache(9, 512, 4, 3, 4) == 5 and splits_in_cache(9, 512, 4, 1, 4) == 1
    actual = run(mixture(case, ids, path=path, backend="triton"), inputs)
    assert_close(actual, expected(case, ids, inputs), torch.float32, 1e-5)
    narrow = {**inputs, "out": None}
    actual = run(mixture(case, ids, path=path, backend="triton"), narrow)
    assert_close(actual, expected(case, ids, narrow), torch.float32, 1e-5)


@pytest.mark.parametrize("path", ["dense", "grouped"])
def test_a_program_writes_several_tiles_of_columns(
    path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = sys.modules["moelora_kernels.triton.expand"]  # the package has a function of the name
    monkeypatch.setattr(module, "out_tiles", lambda programs, device: 3)
    # h of all ranks held; not; and weighted by a kernel of its own.
    for rows, ranks in ((9, (2, 4, 3)), (9, (40, 20, 3)), (70, (40, 20, 3))):
        case = Case(rows=rows, ranks=ranks, d_in=24, d_out=250)
        ids, inputs = make(case, torch.float32)
        actual = run(mixture(case, ids, path=path, backend="triton"), inputs)
        assert_close(actual, expected(case, ids, inputs), torch.float32)


@pytest.mark.parametrize("path", ["grouped", "sequence"])
def test_wide_rows_of_the_gradients_of_many_experts(path: str) -> None:
    half, cpu = torch.empty(0, dtype=torch.float16), Tile(16, 16, 64)
    widths = [with_wide_rows(cpu, experts, 72, half).BLOCK_D for experts in (70, 40, 20)]
    assert widths == [256, 64, 64] and with_wide_rows(cpu, 40, 200, half).BLOCK_D == 128
    case = Case(rows=8, ranks=(2,) * 70, d_in=40, d_out=72)
    ids, inputs = make(case, torch.float16)
    actual = run(mixture(case, ids, path=path, backend="triton"), inputs)
    assert_close(actual, expected(case, ids, inputs), torch.float16)
