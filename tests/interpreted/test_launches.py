"""How often a kernel is launched, and how many other operators run: neither depends on E, and
hardly on K.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from moelora_kernels import Layout, TopK, build_plan, expand, plan_decoding, router_logits, shrink
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


@pytest.mark.parametrize("linears", [1, 3])
@pytest.mark.parametrize(
    ("experts", "rank", "d_in", "slots", "null_expert", "more"),
    [
        (8, 1, 16, 1, False, 0),
        (8, 1, 4096, 2, True, 0),
        (33, 1, 16, 4, False, 0),
        (3, 80, 16, 2, True, 0),  # more ranks than one program holds
        (65, 1, 16, 2, True, 3),  # routed by two launches; the shrink's planes are one more
        (100, 8, 1024, 2, True, 3),
        (1024, 1, 16, 4, True, 3),
    ],
)
def test_decoding(
    experts: int,
    rank: int,
    d_in: int,
    slots: int,
    null_expert: bool,
    more: int,
    linears: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One for the site and one for each linear: the router is inside. With more experts than a
    program holds, at most three more.
    """
    case = Case(rows=2, ranks=(rank,) * experts, num_slots=slots, d_in=d_in)
    _, inputs = make(case, torch.float32)
    router = TopK(torch.randn(experts + null_expert, d_in), None, True, null_expert)
    lora_A = inputs["lora_A"].repeat(linears, 1)
    site = Layout((case.offsets,) * linears)
    own = case.layout

    def step() -> None:
        plan = plan_decoding(inputs["x"], router, slots, case.offsets[-1])
        for h in shrink(inputs["x"], lora_A, site, plan):
            expand(h, inputs["lora_B"], own, plan, inputs["out"], inplace=True)

    count = counted(step, monkeypatch)
    assert count.kernels + len(count.names) <= 1 + linears + more
    assert count.kernels >= 1 + linears


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(("tokens", "experts"), [(3, 5), (40, 70), (600, 5)])
def test_a_router(
    tokens: int, experts: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The logits are one launch and the sum of its planes; backward dx, dW and the sum of its."""
    x = torch.randn(tokens, 16).to(dtype).requires_grad_()
    weight = torch.randn(experts, 16, requires_grad=True)
    logits = []
    forward = counted(
        lambda: logits.append(router_logits(x, weight, backend="triton")), monkeypatch
    )
    monkeypatch.undo()
    dlogits = torch.randn(tokens, experts)
    backward = counted(lambda: torch.autograd.grad(logits[0], (x, weight), dlogits), monkeypatch)
    assert forward.kernels == 1 and len(forward.names) <= 1
    assert backward.kernels == 2 and len(backward.names) <= 1
