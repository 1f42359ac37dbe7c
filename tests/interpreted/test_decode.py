"""The decode path: the kernels route, shrink and expand a few tokens; against the specification in
float64.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from moelora_kernels import Layout, Plan, TopK, build_decode_plan, expand, reference, shrink
from torch import Tensor

from tests.kernels.cases import DTYPES, Case, assert_close, make, with_ranks


def router_of(case: Case, bias: bool = False, norm: bool = True) -> TopK:
    experts = len(case.ranks)
    return TopK(
        torch.randn(experts, case.d_in) / case.d_in**0.5,
        torch.randn(experts) if bias else None,
        norm,
    )


def decode(case: Case, router: TopK, inputs: dict[str, Any], **options: Any) -> tuple[Tensor, Plan]:
    plan = build_decode_plan(router, case.rows, case.num_slots)
    (h,) = shrink(inputs["x"], inputs["lora_A"], case.layout, plan)
    return expand(h, inputs["lora_B"], case.layout, plan, inputs["out"], **options), plan


def assert_decodes(case: Case, router: TopK, dtype: torch.dtype) -> None:
    _, inputs = make(case, dtype)
    y, plan = decode(case, router, inputs, dtype=dtype)
    ids, weights = reference.top_k(
        inputs["x"].double(),
        router.weight.double(),
        case.num_slots,
        router.selection_bias,
        router.norm,
    )
    assert torch.equal(plan.expert_ids, ids)
    torch.testing.assert_close(plan.weights.double(), weights, rtol=1e-4, atol=1e-6)
    doubles = [inputs[name].double() for name in ("x", "lora_A", "lora_B")]
    out = None if inputs["out"] is None else inputs["out"].double()
    wanted = reference.lora_mixture(*doubles, ids, weights, case.offsets, case.scales, out)
    assert y.dtype == dtype
    assert_close({"y": y}, {"y": wanted}, dtype, 1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("norm", [False, True], ids=["", "norm"])
def test_options(bias: bool, norm: bool, dtype: torch.dtype) -> None:
    case = with_ranks((4, 0, 3, 8, 1), rows=5, d_in=40, d_out=72)
    assert_decodes(case, router_of(case, bias, norm), dtype)


@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_any_shape(data: st.DataObject) -> None:
    ranks = data.draw(st.lists(st.integers(0, 5), min_size=1, max_size=20), label="ranks")
    case = with_ranks(
        ranks,
        rows=data.draw(st.integers(0, 40), label="tokens"),
        num_slots=data.draw(st.integers(1, min(4, len(ranks))), label="K"),
        d_in=data.draw(st.integers(1, 600), label="d_in"),
        with_out=data.draw(st.booleans(), label="out"),
    )
    torch.manual_seed(0)
    assert_decodes(case, router_of(case), torch.float32)


def test_a_site_is_routed_and_shrunk_at_once() -> None:
    case = with_ranks((4, 2, 3), rows=3, d_in=24)
    router = router_of(case)
    _, inputs = make(case, torch.float32)
    other = make(case, torch.float32, seed=1)[1]
    plan = build_decode_plan(router, 3, 2)
    factors = torch.cat([inputs["lora_A"], other["lora_A"]])
    hs = shrink(inputs["x"], factors, Layout((case.offsets,) * 2), plan)
    for h, own in zip(hs, (inputs, {**other, "x": inputs["x"]}), strict=True):
        y = expand(h, own["lora_B"], case.layout, plan, own["out"])
        torch.testing.assert_close(y, decode(case, router, own)[0], rtol=1e-5, atol=1e-5)


def test_in_place_and_not() -> None:
    case = with_ranks((4, 4), rows=3)
    router = router_of(case)
    _, inputs = make(case, torch.float32)
    before = inputs["out"].clone()
    y, _ = decode(case, router, inputs)
    assert torch.equal(inputs["out"], before)
    assert decode(case, router, inputs, inplace=True)[0] is inputs["out"]
    assert torch.equal(inputs["out"], y)


def test_a_router_that_says_nan_gives_nan_and_no_wild_expert() -> None:
    case = with_ranks((4, 4, 4), rows=2)
    _, inputs = make(case, torch.float32)
    inputs["x"][1] = torch.nan
    y, plan = decode(case, router_of(case), inputs)
    assert y[0].isfinite().all() and y[1].isnan().all()
    assert int(plan.expert_ids.min()) >= 0 and int(plan.expert_ids.max()) < 3


@pytest.mark.parametrize(
    ("case", "message"),
    [
        (with_ranks((1,) * 65, rows=1), "E=65"),
        (with_ranks((1,) * 3, rows=65), "T=65"),
        (with_ranks((100, 100), rows=1), "R=200 in torch.float32, expected .* 128 ranks"),
    ],
)
def test_what_does_not_fit_is_refused(case: Case, message: str) -> None:
    _, inputs = make(case, torch.float32)
    with pytest.raises(ValueError, match=message):
        decode(case, router_of(case), inputs)


def test_a_router_of_another_kind_is_refused() -> None:
    with pytest.raises(
        TypeError, match=r"router.weight is torch.float16 \(3, 8\), expected torch.float32"
    ):
        build_decode_plan(TopK(torch.zeros(3, 8).half()), 1, 2)
    with pytest.raises(ValueError, match="num_slots=4, expected 1 to the router's 3"):
        build_decode_plan(TopK(torch.zeros(3, 8)), 1, 4)


@pytest.mark.parametrize("name", ["x", "lora_A", "lora_B", "out", "router"])
def test_what_wants_a_gradient_is_refused(name: str) -> None:
    case = with_ranks((2, 2), rows=2)
    router = router_of(case)
    _, inputs = make(case, torch.float32)
    (router.weight if name == "router" else inputs[name]).requires_grad_()
    with pytest.raises(
        ValueError, match=f"{name} requires a gradient, which path='decode' does not give"
    ):
        decode(case, router, inputs)
    with torch.no_grad():
        decode(case, router, inputs)
