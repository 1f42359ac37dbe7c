"""How often a kernel is launched, and how many other operators run: neither depends on E, and
hardly on K.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from moelora_kernels import Layout, TopK, expand, plan_decoding, router_logits, shrink
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.interpreter import GridExecutor

from tests.kernels.cases import Case, make, mixture


class Count(TorchDispatchMode):
    """Counts launches of kernels and, apart from what only gives a tensor another shape, torch's
    operators.
    """

    def __init__(self) -> None:
        super().__init__()
        self.kernels = self.operators = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        views = (
            "view",
            "split",
            "slice",
            "unbind",
            "select",
            "expand",
            "detach",
            "alias",
            "t",
            "empty",
            "squeeze",
        )
        if not any(view in str(func) for view in views) and "moelora" not in str(func):
            self.operators += 1
        return func(*args, **(kwargs or {}))


def counted(function: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> Count:
    count, launch = Count(), GridExecutor.__call__

    def counting(self, *args, **kwargs):
        count.kernels += 1
        return launch(self, *args, **kwargs)

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
    forward = counted(
        lambda: y.append(mixture(case, ids, path=path, backend="triton")(**leaves)), monkeypatch
    )
    monkeypatch.undo()
    backward = counted(lambda: y[0].sum().backward(), monkeypatch)
    passes = slots if path == "grouped" else 1
    # shrink, expand · u, its gate, dB, dx, dA
    assert (forward.kernels, backward.kernels) == (1 + passes, 4 + passes)
    smallest = case_of(2, 2)
    ids, inputs = make(smallest, torch.float32)
    leaves = {n: t.requires_grad_() for n, t in inputs.items()}
    monkeypatch.undo()
    same = counted(
        lambda: mixture(smallest, ids, path=path, backend="triton")(**leaves), monkeypatch
    )
    assert forward.operators == same.operators


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

    def step() -> None:
        plan = plan_decoding(inputs["x"], router, slots, case.offsets[-1])
        for h in shrink(inputs["x"], lora_A, site, plan):
            expand(h, inputs["lora_B"], case.layout, plan, inputs["out"], inplace=True)

    count = counted(step, monkeypatch)
    assert count.kernels + count.operators <= 1 + linears + more
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
    assert forward.kernels == 1 and forward.operators <= 1
    assert backward.kernels == 2 and backward.operators <= 1
