"""An infinity or a NaN in one expert: NaN for the tokens that chose it, nothing for the others."""

from __future__ import annotations

import pytest
import torch
from moelora_kernels import PATHS
from torch import Tensor

from tests.kernels.cases import TOLERANCE, Case, expected, make, mixture, run

BAD = 1
# All ranks in one tile, and in several.
RANKS = {"one tile of ranks": (3, 5, 4), "several": (40, 24, 80)}
VALUES = {"inf": torch.inf, "-inf": -torch.inf, "nan": torch.nan}


def case_of(ranks: tuple[int, ...], tokens_per_row: int) -> tuple[Case, Tensor, dict[str, Tensor]]:
    """Some rows with the bad expert, some without, one without any; never twice the same."""
    ids = torch.tensor([[0, 2], [0, 1], [2, 0], [1, 2], [-1, 0], [-1, -1], [1, -1]])
    case = Case(rows=len(ids), ranks=ranks, tokens_per_row=tokens_per_row, d_in=40, d_out=24)
    return case, ids, make(case, torch.float32)[1]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("value", VALUES.values(), ids=VALUES.keys())
@pytest.mark.parametrize("where", ["lora_A", "lora_B"])
@pytest.mark.parametrize("ranks", RANKS.values(), ids=RANKS.keys())
def test_only_who_chose_it(ranks: tuple[int, ...], where: str, value: float, path: str) -> None:
    case, ids, inputs = case_of(ranks, 2)
    wanted = expected(case, ids, inputs)
    row = case.offsets[BAD] + 1
    broken = {**inputs, where: inputs[where].clone()}
    broken[where][row, 7] = value
    specified = expected(case, ids, broken)
    actual = run(mixture(case, ids, path=path, backend="triton"), broken)

    hit = (ids == BAD).any(1).repeat_interleave(2)
    own = slice(case.offsets[BAD], case.offsets[BAD + 1])
    others = torch.ones(case.offsets[-1], dtype=torch.bool)
    others[own] = False
    unaffected = {
        "y": ~hit, "dx": ~hit, "dout": slice(None), "dlora_A": others, "dlora_B": others,
        "dweights": ids != BAD,
    }  # fmt: skip
    for name, rows in unaffected.items():
        right = wanted[name][rows]
        error = (actual[name][rows].double() - right).abs().max() / wanted[name].abs().max()
        assert error <= TOLERANCE[torch.float32], f"{name}: {error}"  # a NaN is not
    for name, result in actual.items():
        finite = specified[name].isfinite()
        assert not result[~finite].isfinite().any(), name
    if where == "lora_B":
        assert not actual["y"][hit][:, 7].isfinite().any()
    assert not actual["dx" if where == "lora_A" else "y"][hit][:, 7].isfinite().any()


@pytest.mark.parametrize("path", PATHS)
def test_without_gradients_and_in_16_bits(path: str) -> None:
    case, ids, inputs = case_of((3, 5, 4), 1)
    halves = {n: t if n == "weights" else t.half() for n, t in inputs.items()}
    halves["lora_B"] = inputs["lora_B"]
    wanted = expected(case, ids, halves)["y"]
    halves["lora_B"] = inputs["lora_B"].clone()
    halves["lora_B"][case.offsets[BAD], 3] = 1e6  # an infinity of fp16 alone
    halves["lora_A"][case.offsets[BAD] + 1] = torch.nan
    hit = (ids == BAD).any(1)
    with torch.no_grad():
        y = mixture(case, ids, path=path, backend="triton")(**halves)
    error = (y[~hit].double() - wanted[~hit]).abs().max() / wanted.abs().max()
    assert error <= TOLERANCE[torch.float16]
    assert y[hit].isnan().any(1).all()
