"""The specification against the equation written once more, as one dense matrix a token."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.kernels.cases import CASES, Case, expected, make


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_is_the_sum_of_each_tokens_own_updates(case: Case) -> None:
    ids, inputs = make(case, torch.float64)
    x, lora_A, lora_B, weights, out = inputs.values()
    updates = _updates(case, lora_A, lora_B)
    y = torch.zeros(len(x), case.d_out, dtype=x.dtype) if out is None else out.clone()
    for token in range(len(x)):
        row = token // case.tokens_per_row
        for expert, weight in zip(ids[row].tolist(), weights[row].tolist(), strict=True):
            if expert >= 0:
                y[token] += weight * x[token] @ updates[expert]
    torch.testing.assert_close(expected(case, ids, inputs)["y"], y)


def test_a_fixed_mixture_is_one_lora() -> None:
    case = Case(rows=5, ranks=(2, 3), num_slots=2, scaling=(1.0, 1.0))
    _, inputs = make(case, torch.float64)
    x, lora_A, lora_B, weights, out = inputs.values()
    ids = torch.tensor([[0, 1]]).expand(5, 2)
    ones = {**inputs, "weights": torch.ones_like(weights)}
    torch.testing.assert_close(expected(case, ids, ones)["y"], out + x @ lora_A.T @ lora_B)


def _updates(case: Case, lora_A: Tensor, lora_B: Tensor) -> list[Tensor]:
    """s_e A_eᵀ B_e of every expert."""
    pairs = zip(lora_A.split(case.ranks), lora_B.split(case.ranks), strict=True)
    return [scale * A.T @ B for scale, (A, B) in zip(case.scales, pairs, strict=True)]
