"""The kernels as torch operators: opcheck, whole graphs in torch.compile, no second derivative."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from moelora_kernels import (
    PATHS,
    Layout,
    TopK,
    build_decode_plan,
    build_plan,
    expand,
    plan_decoding,
    router_logits,
    shrink,
)
from moelora_kernels.triton import operators
from torch import Tensor
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode

from tests.kernels.cases import Case, make, mixture, run

CASE = Case(rows=5, ranks=(2, 5, 3), tokens_per_row=2)


class Calls(TorchDispatchMode):
    """The arguments of every call of an operator of ours."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[Any, tuple]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "moelora":
            self.seen.append((func, tuple(_copy(a) for a in args)))
        return func(*args, **(kwargs or {}))


def _copy(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().clone(memory_format=torch.preserve_format)
    return [_copy(v) for v in value] if isinstance(value, (list, tuple)) else value


def every_call() -> list[tuple[Any, tuple]]:
    """Calls of every operator, as the paths and decoding make them in a graph."""
    ids, inputs = make(CASE, torch.float32)
    router = TopK(torch.randn(3, 16))
    layout = CASE.layout
    with pytest.MonkeyPatch.context() as patch, Calls() as calls:
        patch.setattr(operators, "in_graph", lambda tensor: True)
        for path in PATHS:
            run(mixture(CASE, ids, path=path, backend="triton"), inputs)
        x, lora_A, lora_B, weights, out = inputs.values()
        plan = build_plan(
            ids, weights, 3, total_rank=10, tokens_per_row=2, path="dense", backend="triton"
        )
        with torch.no_grad():
            (h,) = shrink(x, lora_A, layout, plan)
            expand(h, lora_B, layout, plan, out.clone(), inplace=True)
            decoding = build_decode_plan(router, 10, 2)
            for linears in (1, 2):
                site = Layout((CASE.offsets,) * linears)
                hs = shrink(x, lora_A.repeat(linears, 1), site, decoding)
                expand(hs[0], lora_B, layout, decoding, out)
            plan_decoding(x, TopK(torch.randn(80, 16), null_expert=True), 2, 10)
        weight = torch.randn(3, 16, requires_grad=True)
        router_logits(x.clone().requires_grad_(), weight, backend="triton").sum().backward()
    return calls.seen


def test_opcheck() -> None:
    calls = every_call()
    for func, args in calls:
        opcheck(func, args)
    assert {func._opname for func, _ in calls} == {f.name for f in operators.OPERATORS}


@pytest.mark.parametrize("path", PATHS)
def test_compiles_as_one_graph(path: str) -> None:
    """The plan, its sort and the gradients included; the same bits as without the compiler."""
    ids, inputs = make(CASE, torch.float32)
    function = mixture(CASE, ids, path=path, backend="triton")

    def flat(x: Tensor, lora_A: Tensor, lora_B: Tensor, weights: Tensor, out: Tensor) -> Tensor:
        return function(x, lora_A, lora_B, weights, out)

    compiled = torch.compile(flat, fullgraph=True, backend="aot_eager")
    wanted = run(flat, inputs)
    for name, value in run(lambda **tensors: compiled(**tensors), inputs).items():
        assert torch.equal(value, wanted[name]), name


@pytest.mark.parametrize("path", PATHS)
def test_numbers_of_tokens_share_a_graph(path: str) -> None:
    """Three lengths, the longest of them with larger tiles of tokens: at most two graphs."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    case = replace(CASE, ranks=(3,), num_slots=1, tokens_per_row=1, d_in=4, d_out=4)

    def function(x: Tensor, lora_A: Tensor, lora_B: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        plan = build_plan(ids, weights, 1, total_rank=3, path=path, backend="triton")
        (h,) = shrink(x, lora_A, layout, plan)
        return expand(h, lora_B, layout, plan)

    layout = case.layout
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (5, 9, 20):
        ids, inputs = make(replace(case, rows=rows), torch.float32)
        tensors = [inputs[name].requires_grad_() for name in ("x", "lora_A", "lora_B")]
        y = compiled(*tensors, ids, inputs["weights"])
        assert torch.equal(y, function(*tensors, ids, inputs["weights"]))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2


def test_a_shared_lora_A_compiles_as_one_graph() -> None:
    case = replace(CASE, ranks=(4, 4, 4))
    ids, inputs = make(case, torch.float32)
    inputs["lora_A"] = inputs["lora_A"][:4]
    shared = Layout([case.offsets], shared=True)

    def function(x: Tensor, lora_A: Tensor, lora_B: Tensor, weights: Tensor, out: Tensor) -> Tensor:
        plan = build_plan(ids, weights, 3, total_rank=12, tokens_per_row=2, path="grouped")
        (h,) = shrink(x, lora_A, shared, plan, backend="triton")
        return expand(h, lora_B, case.layout, plan, out, backend="triton")

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    wanted = run(function, inputs)
    for name, value in run(lambda **tensors: compiled(**tensors), inputs).items():
        assert torch.equal(value, wanted[name]), name


@pytest.mark.parametrize("shared", [False, True])
def test_decoding_compiles_as_one_graph(shared: bool) -> None:
    case = replace(CASE, ranks=(4, 4, 4)) if shared else CASE
    _, inputs = make(case, torch.float32)
    router = TopK(torch.randn(3, 16))
    of_A = Layout([case.offsets], shared=shared)
    of_B = case.layout
    lora_A = inputs["lora_A"][:4] if shared else inputs["lora_A"]

    def step(x: Tensor, out: Tensor) -> Tensor:
        plan = build_decode_plan(router, 10, 2)
        (h,) = shrink(x, lora_A, of_A, plan)
        return expand(h, inputs["lora_B"], of_B, plan, out)

    torch._dynamo.reset()
    with torch.no_grad():
        compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(inputs["x"], inputs["out"]), step(inputs["x"], inputs["out"]))


@pytest.mark.parametrize("experts", [3, 80])
def test_a_site_that_routes_compiles_as_one_graph(experts: int) -> None:
    """In the expand, and before it."""
    case = Case(rows=4, ranks=(2,) * experts)
    _, inputs = make(case, torch.float32)
    router = TopK(torch.randn(experts + 1, 16), null_expert=True, input_norm=True)

    def step(x: Tensor, out: Tensor) -> Tensor:
        plan = plan_decoding(x, router, 2, 2 * experts)
        (h,) = shrink(x, inputs["lora_A"], case.layout, plan)
        return expand(h, inputs["lora_B"], case.layout, plan, out)

    with torch.no_grad():
        compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(inputs["x"], inputs["out"]), step(inputs["x"], inputs["out"]))


def test_a_second_derivative_is_refused() -> None:
    ids, inputs = make(CASE, torch.float32)
    leaves = {n: t.requires_grad_() for n, t in inputs.items()}
    y = mixture(CASE, ids, path="dense", backend="triton")(**leaves)
    (dx,) = torch.autograd.grad(y.square().sum(), leaves["x"], create_graph=True)
    with pytest.raises(RuntimeError):
        dx.sum().backward()
