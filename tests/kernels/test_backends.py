"""Every backend on every path (Triton under its interpreter): values and all gradients against the
specification.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from moelora_kernels import PATHS, Layout, build_plan, expand, lora_mixture, shrink
from torch import Tensor

from tests.kernels.cases import (
    BACKENDS_AND_PATHS,
    CANCELLING,
    CASES,
    DTYPES,
    EXACT,
    HALVES,
    INTERPRETED,
    TOLERANCE,
    Case,
    assert_close,
    expected,
    make,
    mixture,
    run,
    with_ranks,
)

everywhere = pytest.mark.parametrize(("backend", "path"), BACKENDS_AND_PATHS)


@everywhere
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_values_and_gradients(case: Case, dtype: torch.dtype, backend: str, path: str) -> None:
    ids, inputs = make(case, dtype)
    actual = run(mixture(case, ids, path=path, backend=backend), inputs)
    assert_close(actual, expected(case, ids, inputs), dtype)
    for name, tensor in inputs.items():
        assert tensor is None or actual[f"d{name}"].dtype == tensor.dtype
    assert actual["y"].dtype == dtype


@pytest.mark.skipif(INTERPRETED, reason="the Triton kernels have no fp64")
@everywhere
@pytest.mark.parametrize("ranks", [(2, 2), (1, 3)], ids=str)
def test_gradcheck(ranks: tuple[int, ...], backend: str, path: str) -> None:
    case = with_ranks(ranks, rows=3, tokens_per_row=2, d_in=3, d_out=2)
    ids, inputs = make(case, torch.float64)
    leaves = [t.requires_grad_() for t in inputs.values() if t is not None]
    assert torch.autograd.gradcheck(mixture(case, ids, path=path, backend=backend), leaves)


@everywhere
@given(data=st.data())
@settings(max_examples=25, deadline=None)
def test_any_shape(data: st.DataObject, backend: str, path: str) -> None:
    sizes = {"rows": (0, 4), "tokens_per_row": (0, 3), "num_slots": (0, 3), "d_in": (1, 5)}
    fields = {n: data.draw(st.integers(*bounds), label=n) for n, bounds in sizes.items()}
    ranks = data.draw(st.lists(st.integers(0, 4), min_size=1, max_size=5), label="ranks")
    case = with_ranks(ranks, d_out=3, with_out=data.draw(st.booleans(), label="out"), **fields)
    ids, inputs = make(case, EXACT, seed=data.draw(st.integers(0, 9), label="seed"))
    actual = run(mixture(case, ids, path=path, backend=backend), inputs)
    assert_close(actual, expected(case, ids, inputs), EXACT, CANCELLING)


@everywhere
@pytest.mark.parametrize("frozen", ["x", "lora_A", "lora_B", "weights", "out"])
def test_a_frozen_input_changes_no_other_gradient(frozen: str, backend: str, path: str) -> None:
    case = with_ranks((2, 4))
    ids, inputs = make(case, EXACT)
    function = mixture(case, ids, path=path, backend=backend)
    fixed = inputs.pop(frozen)
    every = run(function, {**inputs, frozen: fixed})
    every.pop(f"d{frozen}")
    actual = run(lambda **others: function(**others, **{frozen: fixed}), inputs)
    for name, value in actual.items():
        assert torch.equal(value, every[name]), name


@everywhere
def test_without_gradients_the_values_are_the_same(backend: str, path: str) -> None:
    ids, inputs = make(CASES["mixed ranks pad"], torch.float32)
    function = mixture(CASES["mixed ranks pad"], ids, path=path, backend=backend)
    with torch.inference_mode():
        y = function(**inputs)
    assert torch.equal(y, run(function, inputs)["y"])


@everywhere
@pytest.mark.parametrize("ranks", [((2, 2), (4, 4)), ((3, 1), (2, 2)), ((0, 0), (1, 2))], ids=str)
def test_a_site_shrinks_its_linears_at_once(ranks: Any, backend: str, path: str) -> None:
    cases = [with_ranks(r, rows=4, tokens_per_row=2) for r in ranks]
    ids, first = make(cases[0], EXACT)
    second = {**make(cases[1], EXACT, seed=1)[1], "x": first["x"]}

    def both(x: Tensor, weights: Tensor, A0: Tensor, A1: Tensor, B0: Tensor, B1: Tensor) -> Tensor:
        plan = build_plan(ids, weights, 2, total_rank=8, tokens_per_row=2, path=path)
        site = Layout([case.offsets for case in cases])
        hs = shrink(x, torch.cat([A0, A1]), site, plan, backend=backend)
        parts = zip(hs, (B0, B1), cases, strict=True)
        ys = [expand(h, B, c.layout, plan, backend=backend) for h, B, c in parts]
        return torch.cat(ys, dim=1)

    names = {"A0": first["lora_A"], "A1": second["lora_A"], "B0": first["lora_B"]}
    shared = {"x": first["x"], "weights": first["weights"]}
    actual = run(both, {**shared, **names, "B1": second["lora_B"]})

    def apart(x: Tensor, weights: Tensor, A0: Tensor, A1: Tensor, B0: Tensor, B1: Tensor) -> Tensor:
        pairs = zip(cases, ((A0, B0), (A1, B1)), strict=True)
        return torch.cat(
            [mixture(c, ids, backend="reference")(x, A, B, weights, None) for c, (A, B) in pairs], 1
        )

    assert_close(actual, run(apart, {**shared, **names, "B1": second["lora_B"]}), EXACT)


@everywhere
@pytest.mark.parametrize("phi", [torch.tanh, torch.relu], ids=["tanh", "relu"])
def test_an_activation_between(phi: Callable[[Tensor], Tensor], backend: str, path: str) -> None:
    case = with_ranks((3, 0, 2), rows=5, scaling=(1.0, 2.0, 3.0))
    ids, inputs = make(case, EXACT)
    inputs.pop("out")

    def function(name: str, path: str) -> Callable[..., Tensor]:
        def activated(x: Tensor, lora_A: Tensor, lora_B: Tensor, weights: Tensor) -> Tensor:
            plan = build_plan(ids, weights, 3, total_rank=5, path=path)
            (h,) = shrink(x, lora_A, case.layout, plan, backend=name)
            return expand(phi(h), lora_B, case.layout, plan, backend=name)

        return activated

    wanted = run(function("reference", "dense"), inputs)
    assert_close(run(function(backend, path), inputs), wanted, EXACT)


@everywhere
def test_weights_of_empty_slots_are_never_read(backend: str, path: str) -> None:
    case = CASES["rows of several tokens, mixed ranks"]
    ids, inputs = make(case, EXACT)
    assert (ids < 0).any()
    wanted = expected(case, ids, inputs)
    poisoned = {**inputs, "weights": inputs["weights"].masked_fill(ids < 0, torch.nan)}
    actual = run(mixture(case, ids, path=path, backend=backend), poisoned)
    assert_close(actual, wanted, EXACT)


@everywhere
@pytest.mark.parametrize("ranks", [(4, 4, 4), (4, 0, 2)], ids=str)
def test_nothing_uninitialised_is_read(ranks: tuple[int, ...], backend: str, path: str) -> None:
    case = with_ranks(ranks, rows=4, tokens_per_row=2)
    ids, inputs = make(case, EXACT)
    wanted = expected(case, ids, inputs)
    torch.use_deterministic_algorithms(True)  # fills what torch.empty gives with NaN
    try:
        actual = run(mixture(case, ids, path=path, backend=backend), inputs)
    finally:
        torch.use_deterministic_algorithms(False)
    assert_close(actual, wanted, EXACT)


@everywhere
def test_the_same_bits_again(backend: str, path: str) -> None:
    # The interpreter runs one program after another: there a small shape tells as much.
    rows, repeats = (6, 1) if INTERPRETED else (64, 3)
    case = Case(rows=rows, tokens_per_row=4, ranks=(8,) * 6, d_in=96, d_out=160)
    ids, inputs = make(case, torch.float32)
    function = mixture(case, ids, path=path, backend=backend)
    first = run(function, inputs)
    for _ in range(repeats):
        for name, value in run(function, inputs).items():
            assert torch.equal(value, first[name]), name


@everywhere
def test_strided_inputs(backend: str, path: str) -> None:
    case = CASES["rows of several tokens"]
    ids, inputs = make(case, EXACT)
    strided = {n: None if t is None else t.T.contiguous().T for n, t in inputs.items()}
    actual = run(mixture(case, ids, path=path, backend=backend), strided)
    assert_close(actual, expected(case, ids, inputs), EXACT)
    x = inputs["x"]
    batch = x.view(3, 5, -1)  # a batch of sequences, and a gradient that is one number expanded
    y = mixture(case, ids, path=path, backend=backend)(**{**inputs, "x": batch.requires_grad_()})
    y.sum().backward()
    assert batch.grad is not None and batch.grad.shape == batch.shape


@everywhere
@pytest.mark.parametrize("tokens_per_row", [1, 3])
def test_one_choice_expanded_to_all_rows(tokens_per_row: int, backend: str, path: str) -> None:
    case = Case(tokens_per_row=tokens_per_row)
    ids, inputs = make(case, EXACT)
    ids = torch.tensor([[2, 0]]).expand_as(ids)
    weights = inputs["weights"][:1].expand_as(inputs["weights"])

    def given(x: Tensor, lora_A: Tensor, lora_B: Tensor, weights: Tensor, out: Any) -> Tensor:
        sizes = {"total_rank": case.offsets[-1], "tokens_per_row": tokens_per_row}
        how = {"path": path, "backend": backend, "complete": True}
        plan = build_plan(ids, weights, len(case.ranks), **sizes, **how)
        (h,) = shrink(x, lora_A, Layout((case.offsets,)), plan)
        return expand(h, lora_B, case.layout, plan, out)

    inputs["weights"] = weights
    assert_close(run(given, inputs), expected(case, ids.clone(), inputs), EXACT)


@everywhere
def test_in_place_writes_into_out_and_nowhere_else(backend: str, path: str) -> None:
    case = CASES["mixed ranks pad"]
    ids, inputs = make(case, EXACT)

    def function(inplace: bool) -> Callable[..., Tensor]:
        def fused(
            x: Tensor, lora_A: Tensor, lora_B: Tensor, weights: Tensor, out: Tensor
        ) -> Tensor:
            plan = build_plan(ids, weights, 3, total_rank=9, path=path)
            (h,) = shrink(x, lora_A, case.layout, plan, backend=backend)
            base = (out * 1).view(2, 3, -1)
            fixed = (lora_B, case.layout, plan)
            before = base.detach().clone()
            y = expand(h, *fixed, base, inplace=inplace, backend=backend)
            assert inplace or torch.equal(base, before)
            return y.flatten(0, 1)

        return fused

    wanted = run(function(False), inputs)
    for name, value in run(function(True), inputs).items():
        torch.testing.assert_close(
            value, wanted[name], rtol=10 * TOLERANCE[EXACT], atol=10 * TOLERANCE[EXACT]
        )


@pytest.mark.parametrize("path", PATHS)
def test_eager_in_place_uses_the_memory_of_out(path: str) -> None:
    case = CASES["plain"]
    ids, inputs = make(case, torch.float32)
    x, lora_A, lora_B, weights, out = inputs.values()
    plan = build_plan(ids, weights, 3, total_rank=12, path=path)
    (h,) = shrink(x, lora_A, case.layout, plan)
    for own in (out, out.clone().requires_grad_() * 1):  # without and with gradients
        assert expand(h, lora_B, case.layout, plan, own, inplace=True) is own
    strided = torch.zeros(case.d_out, len(x)).T  # cannot be flattened: the copy is returned
    y = expand(h, lora_B, case.layout, plan, strided, inplace=True)
    fresh = expand(h, lora_B, case.layout, plan)
    torch.testing.assert_close(y, fresh)


WIDER = {**CASES, "one token": Case(rows=1)}


@pytest.mark.parametrize("name", [name for name, case in WIDER.items() if case.with_out])
@pytest.mark.parametrize("path", PATHS)
def test_eager_writes_into_columns_of_a_wider_out(path: str, name: str) -> None:
    case = WIDER[name]
    ids, inputs = make(case, torch.float32)
    x, lora_A, lora_B, weights, out = inputs.values()
    sizes = {"total_rank": case.offsets[-1], "tokens_per_row": case.tokens_per_row}
    plan = build_plan(ids, weights, len(case.ranks), **sizes, path=path)
    (h,) = shrink(x, lora_A, case.layout, plan)
    fixed = (h, lora_B, case.layout, plan)
    wanted = expand(*fixed, out)
    wide = torch.full((len(out), case.d_out + 7), torch.nan)
    columns = wide[:, 3:-4]
    columns.copy_(out)
    with torch.no_grad():
        assert expand(*fixed, columns, inplace=True) is columns
    torch.testing.assert_close(columns, wanted)
    assert wide[:, :3].isnan().all() and wide[:, -4:].isnan().all()


@pytest.mark.parametrize("path", PATHS)
def test_eager_leaves_an_out_whose_rows_are_one(path: str) -> None:
    case = CASES["plain"]
    ids, inputs = make(case, torch.float32)
    x, lora_A, lora_B, weights, out = inputs.values()
    plan = build_plan(ids, weights, 3, total_rank=12, path=path)
    (h,) = shrink(x, lora_A, case.layout, plan)
    row = out[:1].clone()
    with torch.no_grad():
        y = expand(h, lora_B, case.layout, plan, row.expand_as(out), inplace=True)
    assert torch.equal(row, out[:1])
    torch.testing.assert_close(y, row + expand(h, lora_B, case.layout, plan))


@everywhere
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_master_weights_and_autocast(dtype: torch.dtype, backend: str, path: str) -> None:
    case = CASES["rows of several tokens"]
    ids, inputs = make(case, dtype)
    wanted = expected(case, ids, inputs)
    mixed = {n: t if n == "weights" or t is None else t.float() for n, t in inputs.items()}
    plain = {**mixed, "x": inputs["x"], "out": inputs["out"]}
    function = mixture(case, ids, path=path, backend=backend)
    assert_close(run(function, plain), wanted, dtype)

    def cast(**tensors: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=dtype):
            return function(**{**tensors, "out": tensors["out"].to(dtype)})

    actual = run(cast, mixed)
    assert actual["y"].dtype == dtype and actual["dlora_A"].dtype == torch.float32
    assert_close(actual, wanted, dtype)


@everywhere
def test_out_keeps_its_dtype_under_autocast(backend: str, path: str) -> None:
    case = CASES["plain"]
    ids, inputs = make(case, torch.float32)
    with torch.autocast("cpu", dtype=HALVES[0]):
        y = mixture(case, ids, path=path, backend=backend)(**inputs)
    assert y.dtype == torch.float32
    assert_close({"y": y}, {"y": expected(case, ids, inputs)["y"]}, HALVES[0])


def test_a_thousand_experts() -> None:
    case = Case(rows=32, ranks=(2,) * 1024, num_slots=4)
    ids, inputs = make(case, torch.float32)
    assert_close(run(mixture(case, ids), inputs), expected(case, ids, inputs), torch.float32)


def test_validates_ids_on_the_cpu() -> None:
    case = CASES["plain"]
    ids, inputs = make(case, torch.float32)
    x, lora_A, lora_B, weights, out = inputs.values()
    ids[2, 1] = 3
    with pytest.raises(ValueError, match=r"expert_ids has values in -?\d..3, expected -1"):
        lora_mixture(x, lora_A, lora_B, ids, weights, case.offsets, case.scales, out)


SHARED = {
    "a site of two linears": (Case(rows=5), (4, 2), EXACT),
    "in 16 bits": (Case(rows=5), (4, 2), HALVES[0]),
    "a linear without rows": (Case(rows=2, tokens_per_row=3), (0, 2), EXACT),
    "no token": (Case(rows=0), (2,), EXACT),
    "an expert twice in a row": (Case(ids="twice", num_slots=3), (2, 3), EXACT),
    "one expert": (Case(ranks=(1,), num_slots=1), (4,), EXACT),
}


@everywhere
@pytest.mark.parametrize(("case", "ranks", "dtype"), SHARED.values(), ids=SHARED.keys())
def test_a_shared_lora_A_is_one_copy_for_each_expert(
    case: Case, ranks: tuple[int, ...], dtype: torch.dtype, backend: str, path: str
) -> None:
    experts = len(case.ranks)
    cases = [replace(case, ranks=(rank,) * experts) for rank in ranks]
    ids, first = make(cases[0], dtype)
    leaves = {"x": first["x"], "weights": first["weights"]}
    leaves["lora_A"] = torch.randn(sum(ranks), case.d_in).to(dtype)
    for i, own in enumerate(cases):
        leaves |= {f"{n}{i}": t for n, t in make(own, dtype, seed=i)[1].items() if "B" in n}
    site = Layout([own.offsets for own in cases], shared=True)

    def shared(x: Tensor, weights: Tensor, lora_A: Tensor, **lora_Bs: Tensor) -> Tensor:
        sizes = {"total_rank": 8, "tokens_per_row": case.tokens_per_row}
        plan = build_plan(ids, weights, experts, path=path, **sizes)
        hs = shrink(x, lora_A, site, plan, backend=backend)
        parts = zip(hs, lora_Bs.values(), cases, strict=True)
        ys = [expand(h, B, c.layout, plan, backend=backend, dtype=x.dtype) for h, B, c in parts]
        return torch.cat(ys, dim=1)

    def apart(x: Tensor, weights: Tensor, lora_A: Tensor, **lora_Bs: Tensor) -> Tensor:
        parts = zip(lora_A.split(ranks), lora_Bs.values(), cases, strict=True)
        by_linear = [(torch.cat([A] * experts), B, c) for A, B, c in parts]
        ys = [mixture(c, ids, backend="reference")(x, A, B, weights, None) for A, B, c in by_linear]
        return torch.cat(ys, dim=1)

    actual = run(shared, leaves)
    assert_close(actual, run(apart, {n: t.double() for n, t in leaves.items()}), dtype)
    assert actual["dlora_A"].dtype == dtype and actual["y"].dtype == dtype
    with torch.inference_mode():
        torch.testing.assert_close(shared(**leaves), actual["y"])
