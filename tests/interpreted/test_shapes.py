"""Shapes that need more than one tile, split or pass in some dimension, against the specification
in float64.
"""

from __future__ import annotations

import pytest
import torch
from moelora_kernels import PATHS, build_plan
from moelora_kernels.triton import fused_mixture
from torch import Tensor

from tests.kernels.cases import (
    CASES,
    DTYPES,
    Case,
    assert_close,
    expected,
    make,
    mixture,
    run,
    with_ranks,
)

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
ONE_LAUNCH = {name: case for name, case in CASES.items() if case.offsets[-1] <= 64}


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


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", ONE_LAUNCH.values(), ids=ONE_LAUNCH.keys())
def test_the_single_launch(case: Case, dtype: torch.dtype) -> None:
    ids, inputs = make(case, dtype)

    def function(
        x: Tensor, lora_A: Tensor, lora_B: Tensor, weights: Tensor, out: Tensor | None
    ) -> Tensor:
        plan = build_plan(
            ids,
            weights,
            len(case.ranks),
            total_rank=case.offsets[-1],
            tokens_per_row=case.tokens_per_row,
            path="dense",
            backend="triton",
        )
        return fused_mixture(x, lora_A, lora_B, case.offsets, case.scales, plan, out)

    assert_close(run(function, inputs), expected(case, ids, inputs), dtype)


def test_the_single_launch_holds_all_ranks_or_says_so() -> None:
    ids, inputs = make(with_ranks((40, 40)), torch.float32)
    plan = build_plan(
        ids.clamp(max=1), inputs["weights"], 2, total_rank=80, path="dense", backend="triton"
    )
    with pytest.raises(
        ValueError, match="R=80, expected path='dense' and at most 64 ranks in torch.float32"
    ):
        fused_mixture(
            inputs["x"], inputs["lora_A"], inputs["lora_B"], (0, 40, 80), (1.0, 1.0), plan
        )
