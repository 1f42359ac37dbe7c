"""Every mistake a caller can make is named, with what came, what was expected and the remedy."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from moelora_kernels import BACKENDS, Layout, build_plan, expand, lora_mixture, shrink

GOOD: dict[str, Any] = {
    "x": torch.zeros(5, 6),
    "lora_A": torch.zeros(4, 6),
    "lora_B": torch.zeros(4, 7),
    "expert_ids": torch.zeros(5, 2, dtype=torch.int64),
    "expert_weights": torch.zeros(5, 2),
    "rank_offsets": (0, 2, 4),
    "scaling": (1.0, 1.0),
    "out": torch.zeros(5, 7),
}
META = torch.device("meta")
ids = GOOD["expert_ids"]
MISTAKES: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"expert_ids": ids.int()}, TypeError, r"expert_ids is torch.int32, .* pass expert_ids.long"),
    ({"expert_weights": torch.zeros(5, 2).half()}, TypeError, r"expert_weights is torch.float16"),
    ({"expert_weights": torch.zeros(5, 3)}, ValueError, r"expert_weights \(5, 3\), .*\[rows, K\]"),
    ({"expert_ids": ids[0], "expert_weights": torch.zeros(2)}, ValueError, r"expected \[rows, K\]"),
    ({"expert_weights": torch.zeros(5, 2, device=META)}, ValueError, "expected one device"),
    ({"expert_ids": ids + 2}, ValueError, r"values in 2..2, expected -1 \(no expert\) to 1"),
    ({"expert_ids": ids - 2}, ValueError, r"values in -2..-2, expected -1"),
    ({"tokens_per_row": -1}, ValueError, "tokens_per_row=-1"),
    ({"path": "sparse"}, ValueError, "path='sparse' is unknown: .*, matmul, grouped, sequence"),
    ({"backend": "cuda"}, ValueError, f"backend='cuda' is unknown: .*{', '.join(BACKENDS)}"),
    (
        {"backend": "triton"},
        ValueError,
        "backend='triton': x is on the CPU, expected a GPU or Triton's interpreter",
    ),
    ({"x": torch.zeros(4, 6)}, ValueError, r"x is \(4, 6\), expected 5 tokens .* 6 features"),
    ({"x": torch.zeros(5, 8)}, ValueError, r"x is \(5, 8\), expected 5 tokens .* 6 features"),
    ({"x": torch.zeros(6, 5)}, ValueError, r"x is \(6, 5\)"),
    ({"x": torch.zeros(5, 6).int()}, TypeError, "expected floating point"),
    ({"x": torch.zeros(5, 6, device=META)}, ValueError, "expected one device"),
    ({"lora_A": torch.zeros(4, 6, device=META)}, ValueError, "lora_A is on meta"),
    ({"lora_A": torch.zeros(3, 6)}, ValueError, r"lora_A is \(3, 6\), .* 4 rows"),
    ({"lora_B": torch.zeros(5, 7)}, ValueError, r"lora_B is \(5, 7\), .* 4 rows"),
    ({"lora_B": torch.zeros(4, 7).char()}, TypeError, "lora_B is torch.int8"),
    ({"rank_offsets": (2, 2, 4)}, ValueError, r"rank_offsets of a linear is \(2, 2, 4\)"),
    ({"rank_offsets": (0, 3, 2)}, ValueError, "never falling"),
    ({"scaling": (1.0,)}, ValueError, "scaling has 1 values, expected one for each of the 2"),
    ({"out": torch.zeros(4, 7)}, ValueError, r"out is \(4, 7\), expected 5 tokens .* 7 features"),
    ({"out": torch.zeros(5, 6)}, ValueError, r"out is \(5, 6\)"),
    ({"out": torch.zeros(5, 7).int()}, TypeError, "out is torch.int32"),
]


def test_the_good_input_is_good() -> None:
    assert lora_mixture(**GOOD).shape == (5, 7)


@pytest.mark.parametrize(("wrong", "error", "message"), MISTAKES, ids=lambda value: str(value)[:40])
def test_a_mistake_is_named(wrong: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        lora_mixture(**{**GOOD, **wrong})


@pytest.mark.parametrize(
    ("dtypes", "message"),
    [
        ({"x": torch.float64}, "x is torch.float64, expected bfloat16, float16 or float32"),
        (
            {"expert_weights": torch.float64},
            "the weights are torch.float64, expected torch.float32",
        ),
    ],
)
def test_triton_names_the_dtypes_that_it_has(dtypes: dict[str, torch.dtype], message: str) -> None:
    on_meta = {n: t.to("meta") if isinstance(t, torch.Tensor) else t for n, t in GOOD.items()}
    cast = {**on_meta, **{name: on_meta[name].to(dtype) for name, dtype in dtypes.items()}}
    with pytest.raises(ValueError, match=message):
        lora_mixture(**cast, backend="triton")


def test_offsets_of_another_number_of_experts() -> None:
    plan = build_plan(GOOD["expert_ids"], GOOD["expert_weights"], 2, total_rank=4)
    with pytest.raises(ValueError, match=r"has 1 experts, expected 2 \(the plan's num_experts\)"):
        shrink(GOOD["x"], GOOD["lora_A"], Layout([(0, 4)]), plan)
    with pytest.raises(ValueError, match="expected 3 ints from 0"):
        Layout([(0, 2, 4), (0, 4)])
    with pytest.raises(ValueError, match="expected one linear and a scaling for each expert"):
        expand(torch.zeros(4, 4), GOOD["lora_B"], Layout([(0, 2, 4)]), plan)


def test_ids_are_not_read_unless_asked() -> None:
    far = GOOD["expert_ids"] + 9
    build_plan(far, GOOD["expert_weights"], 2, total_rank=4, path="grouped")
    with pytest.raises(ValueError, match="values in 9"):
        build_plan(far, GOOD["expert_weights"], 2, total_rank=4, validate=True)


def test_who_can_share_a_factor() -> None:
    plan = build_plan(GOOD["expert_ids"], GOOD["expert_weights"], 2, total_rank=4)
    with pytest.raises(ValueError, match="experts of other ranks cannot share their rows"):
        Layout([(0, 2, 5)], shared=True)
    shared = Layout([(0, 2, 4)], (1.0, 1.0), shared=True)
    assert shared.to(META).shared and shared.rows == 2
    with pytest.raises(ValueError, match=r"lora_A is \(4, 6\), expected 2 dimensions and 2 rows"):
        shrink(GOOD["x"], GOOD["lora_A"], shared, plan)
    with pytest.raises(ValueError, match="experts share lora_A alone"):
        expand(torch.zeros(5, 4), GOOD["lora_B"], shared, plan)
