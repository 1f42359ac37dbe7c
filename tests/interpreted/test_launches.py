"""How often a kernel is launched, and how many other operators run: neither depends on E, and
hardly on K.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from moelora_kernels import Layout, TopK, build_decode_plan, build_plan, expand, shrink
from moelora_kernels.layout import layout_of
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.interpreter import GridExecutor

from tests.kernels.cases import Case, make, mixture

# What allocates, or gives a tensor another shape, without a launch of its own.
SHAPES_ONLY = {
    *("_reshape_alias", "_unsafe_view", "alias", "as_strided", "detach", "expand", "permute"),
    *("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "select", "slice"),
    *("split", "split_with_sizes", "squeeze", "t", "transpose", "unbind", "unsqueeze", "view"),
}


class Count(TorchDispatchMode):
    """Counts launches of kernels and, apart from what only gives a tensor another shape, torch's
    operators.
    """

    def __init__(self) -> None:
        super().__init__()
        self.kernels = 0
        self.names: list[str] = []
        self.paused = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func).split(".")[1]
        if func.namespace == "aten" and name not in SHAPES_ONLY and not self.paused:
            self.names.append(name)
        return func(*args, **(kwargs or {}))


def counted(
    function: Callable[[], object], monkeypatch: pytest.MonkeyPatch, count: Count | None = None
) -> Count:
    count, launch = count or Count(), GridExecutor.__call__

    def counting(self, *args, **kwargs):
        count.kernels += 1
        count.paused = True  # what the interpreter does is not the kernels' doing
        try:
            return launch(self, *args, **kwargs)
        finally:
            count.paused = False

    monkeypatch.setattr(GridExecutor, "__call__", counting)
    with count:
        function()
    return count


def case_of(experts: int, slots: int) -> Case:
    return Case(rows=4, ranks=(4,) * experts, num_slots=slots, tokens_per_row=2)


@pytest.mark.parametrize("path", ["dense", "sequence", "grouped"])
@pytest.mark.parametrize(("experts", "slots"), [(2, 1), (2, 2), (9, 2), (33, 4)])
def test_forward_and_backward(
    path: str, experts: int, slots: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = case_of(experts, slots)
    ids, inputs = make(case, torch.float32)
    leaves = {n: t.requires_grad_() for n, t in inputs.items()}
    y = []
    layout_of(case.offsets, case.scales, torch.device("cpu"))  # kept
    forward = counted(
        lambda: y.append(mixture(case, ids, path=path, backend="triton")(**leaves)), monkeypatch
    )
    monkeypatch.undo()
    backward = counted(lambda: y[0].sum().backward(), monkeypatch)
    passes = slots if path == "grouped" else 1
    # shrink, expand · u, its gate, dB, dx, dA
    assert (forward.kernels, backward.kernels) == (1 + passes, 4 + passes)
    smallest = case_of(2, slots)
    layout_of(smallest.offsets, smallest.scales, torch.device("cpu"))
    ids, inputs = make(smallest, torch.float32)
    leaves = {n: t.requires_grad_() for n, t in inputs.items()}
    monkeypatch.undo()
    same = counted(
        lambda: mixture(smallest, ids, path=path, backend="triton")(**leaves), monkeypatch
    )
    assert forward.names == same.names


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_products_of_torch(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Path "matmul" with fp32 factors: what it launches beside its six products."""
    case = Case(rows=4, ranks=(4,) * 9, tokens_per_row=2)
    ids, inputs = make(case, torch.float32)
    for name in ("x", "out"):
        inputs[name] = inputs[name].to(dtype)
    leaves = {n: t.requires_grad_() for n, t in inputs.items()}
    leaves["out"] = leaves["out"] * 1
    layout = case.layout
    y = []

    def step() -> None:
        plan = build_plan(
            ids,
            leaves["weights"],
            9,
            total_rank=36,
            tokens_per_row=2,
            path="matmul",
            backend="triton",
        )
        plan_operators.append(len(count.names))
        (h,) = shrink(leaves["x"], leaves["lora_A"], layout, plan)
        y.append(expand(h, leaves["lora_B"], layout, plan, leaves["out"], inplace=True))

    plan_operators: list[int] = []
    count = Count()
    forward = counted(step, monkeypatch, count)
    monkeypatch.undo()
    # Both factors screened, the gate.
    assert forward.kernels == 3
    # The interpreter's stand-ins for a product of 16-bit tensors with an fp32 result cast first.
    products = [n for n in forward.names[plan_operators[0] :] if n != "_to_copy"]
    assert products == ["mm", "addmm_"]
    backward = counted(lambda: y[0].backward(torch.ones_like(y[0])), monkeypatch)
    assert backward.kernels == 2  # the gates' gradients, dh in the dtype of the products
    names = [n for n in backward.names if n not in ("_to_copy", "ones_like")]
    # sum: over a row's tokens; masked_fill, mul: of the plan's weights and of this test.
    assert names == ["mm", "sum", "mm", "mm", "mm", "masked_fill", "mul"]
    if dtype == torch.float32:
        assert "_to_copy" not in forward.names + backward.names


@pytest.mark.parametrize(("d_in", "linears", "kernels"), [(16, 1, 2), (4096, 1, 2), (16, 3, 4)])
@pytest.mark.parametrize(("experts", "slots"), [(8, 1), (33, 4)])
def test_decoding(
    d_in: int, linears: int, kernels: int, experts: int, slots: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One for the site and one for each linear: the router is inside."""
    case = Case(rows=2, ranks=(1,) * experts, num_slots=slots, d_in=d_in)
    _, inputs = make(case, torch.float32)
    router = TopK(torch.randn(experts, d_in))
    lora_A = inputs["lora_A"].repeat(linears, 1)
    site, own = Layout((case.offsets,) * linears), case.layout

    def step() -> None:
        plan = build_decode_plan(router, 2, slots)
        for h in shrink(inputs["x"], lora_A, site, plan):
            expand(h, inputs["lora_B"], own, plan, inputs["out"], inplace=True)

    count = counted(step, monkeypatch)
    assert count.kernels == kernels
    assert count.names == []
