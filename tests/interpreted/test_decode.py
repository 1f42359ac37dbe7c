"""The decode path: the kernels route, shrink and expand a few tokens; against the specification in
float64.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from moelora_kernels import (
    Layout,
    Plan,
    TopK,
    build_decode_plan,
    expand,
    plan_decoding,
    reference,
    shrink,
)
from torch import Tensor

from tests.kernels.cases import DTYPES, Case, assert_close, make, with_ranks

# What a router may have beside its weight: options of TopK.
OPTIONS: dict[str, dict[str, bool]] = {
    "plain": {},
    "bias": {"bias": True},
    "not normalised": {"norm": False, "bias": True},
    "null expert": {"null_expert": True},
    "null expert, bias, not normalised": {"null_expert": True, "bias": True, "norm": False},
    "input norm": {"input_norm": True},
    "all": {"null_expert": True, "bias": True, "input_norm": True},
}


def router_of(case: Case, bias: bool = False, **options: bool) -> TopK:
    choices = len(case.ranks) + options.get("null_expert", False)
    weight = torch.randn(choices, case.d_in) / case.d_in**0.5
    return TopK(weight, torch.randn(choices) if bias else None, **options)


def decode(case: Case, router: TopK, inputs: dict[str, Any], **options: Any) -> tuple[Tensor, Plan]:
    plan = plan_decoding(inputs["x"], router, case.num_slots, case.offsets[-1])
    (h,) = shrink(inputs["x"], inputs["lora_A"], case.layout, plan)
    return expand(h, inputs["lora_B"], case.layout, plan, inputs["out"], **options), plan


def assert_decodes(case: Case, router: TopK, dtype: torch.dtype, path: str = "decode") -> None:
    _, inputs = make(case, dtype)
    y, plan = decode(case, router, inputs, dtype=dtype)
    assert plan.path == path and plan.num_experts == len(case.ranks)
    ids, weights = expected_routing(case, router, inputs["x"])
    assert torch.equal(plan.expert_ids, ids)
    torch.testing.assert_close(plan.weights.double(), weights, rtol=1e-4, atol=1e-6)
    assert y.dtype == dtype
    assert_close({"y": y}, {"y": expected(case, inputs, ids, weights)}, dtype, 1e-5)


def expected_routing(case: Case, router: TopK, x: Tensor) -> tuple[Tensor, Tensor]:
    weight = router.weight.double()
    options = (router.selection_bias, router.norm, router.null_expert, router.input_norm)
    return reference.top_k(x.double(), weight, case.num_slots, *options)


def expected(case: Case, inputs: dict[str, Any], ids: Tensor, weights: Tensor) -> Tensor:
    doubles = [inputs[name].double() for name in ("x", "lora_A", "lora_B")]
    out = None if inputs["out"] is None else inputs["out"].double()
    return reference.lora_mixture(*doubles, ids, weights, case.offsets, case.scales, out)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_options(options: dict[str, bool], dtype: torch.dtype) -> None:
    case = with_ranks((4, 0, 3, 8, 1), rows=5, d_in=40, d_out=72)
    assert_decodes(case, router_of(case, **options), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("ranks", "rows", "path"),
    [
        ((90, 0, 111, 70), 3, "decode"),  # more ranks than a program holds at once
        ((64,) * 5, 1, "sequence"),  # a token chooses few of many bytes
        ((2,) * 70, 3, "dense"),  # more choices than a program holds
        ((8,) * 70, 3, "sequence"),
    ],
    ids=["ranks in blocks", "few of many bytes", "many experts", "few of many experts"],
)
def test_large(ranks: tuple[int, ...], rows: int, path: str, dtype: torch.dtype) -> None:
    case = with_ranks(ranks, rows=rows, d_in=40, d_out=72)
    assert_decodes(case, router_of(case, **OPTIONS["all"]), dtype, path)


def test_a_thousand_experts() -> None:
    case = with_ranks((1,) * 1024, rows=2, num_slots=4, d_in=16, d_out=8)
    assert_decodes(case, router_of(case), torch.float32, "sequence")
    assert_decodes(case, router_of(case, null_expert=True), torch.float32, "sequence")


def test_a_routing_to_the_null_expert_alone_adds_nothing() -> None:
    case = with_ranks((4, 4), rows=3, num_slots=1)
    router = router_of(case, null_expert=True)
    router.weight[-1] = 0.0
    router = TopK(router.weight, torch.tensor([0.0, 0.0, 9.0]), null_expert=True)
    _, inputs = make(case, torch.float32)
    y, plan = decode(case, router, inputs)
    assert torch.equal(y, inputs["out"])
    assert torch.equal(plan.expert_ids, torch.full((3, 1), -1)) and not plan.weights.any()


@pytest.mark.parametrize("name", ["lora_A", "lora_B"])
def test_what_a_token_did_not_choose_does_not_reach_it(name: str) -> None:
    """Zero times an infinity would be a NaN."""
    case = with_ranks((3, 4, 3, 130), rows=6)
    router = router_of(case)
    _, inputs = make(case, torch.float32)
    ids, weights = expected_routing(case, router, inputs["x"])
    own = (ids == 1).any(1)
    assert own.any() and not own.all()
    wanted = expected(case, inputs, ids, weights)
    for bad in (torch.inf, -torch.inf, torch.nan):
        inputs[name][4:6] = bad
        y, _ = decode(case, router, inputs)
        assert_close({"y": y[~own]}, {"y": wanted[~own]}, torch.float32, 1e-5)
        assert not y[own].isfinite().all(1).any()


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


def test_sites_that_share_a_plan_are_routed_each_by_its_own_x() -> None:
    """Both shrink before one expands; the plan's routing is that of the last expand."""
    case = with_ranks((4, 2, 3), rows=3, d_in=24)
    router = router_of(case)
    sites = [make(case, torch.float32, seed)[1] for seed in (0, 1)]
    plan = build_decode_plan(router, 3, 2)
    hs = [shrink(own["x"], own["lora_A"], case.layout, plan)[0] for own in sites]
    for which in (0, 1, 0):
        own = sites[which]
        y = expand(hs[which], own["lora_B"], case.layout, plan, own["out"])
        ids, weights = expected_routing(case, router, own["x"])
        assert torch.equal(plan.expert_ids, ids)
        assert_close({"y": y}, {"y": expected(case, own, ids, weights)}, torch.float32, 1e-5)
    first, second = (expected_routing(case, router, own["x"])[0] for own in sites)
    assert not torch.equal(first, second), "the two sites choose alike: no test"


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
        (with_ranks((1,) * 65, rows=1), "E=65, expected at most 64 tokens and 64 choices"),
        (with_ranks((1,) * 3, rows=65), "T=65"),
    ],
)
def test_what_does_not_fit_is_refused(case: Case, message: str) -> None:
    _, inputs = make(case, torch.float32)
    plan = build_decode_plan(router_of(case), case.rows, 2)
    with pytest.raises(ValueError, match=message):
        shrink(inputs["x"], inputs["lora_A"], case.layout, plan)


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


def test_what_wants_a_gradient_is_refused_where_it_is_routed_first() -> None:
    case = with_ranks((1,) * 65, rows=1)
    router = router_of(case)
    _, inputs = make(case, torch.float32)
    router.weight.requires_grad_()
    with pytest.raises(ValueError, match="router requires a gradient, which a routing of the"):
        decode(case, router, inputs)
