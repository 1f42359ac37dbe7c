"""How often a kernel is launched, and how many other operators run: neither depends on E, and
hardly on K.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from moelora_kernels import Layout, TopK, build_decode_plan, expand, shrink
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


@pytest.mark.parametrize(("d_in", "linears", "kernels"), [(16, 1, 2), (4096, 1, 2), (16, 3, 4)])
@pytest.mark.parametrize(("experts", "slots"), [(8, 1), (33, 4)])
def test_decoding(
    d_in: int, linears: int, kernels: int, experts: int, slots: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One for the site and one for each linear: the router is inside."""
    case = Case(rows=2, ranks=(1,) * experts, num_slots=slots, d_in=d_in)
    _, inputs = make(case, torch.float32)
    router = TopK(torch.randn(experts, d_in))

    def step() -> None:
        plan = build_decode_plan(router, 2, slots)
        lora_A = inputs["lora_A"].repeat(linears, 1)
        for h in shrink(inputs["x"], lora_A, Layout((case.offsets,) * linears), plan):
            expand(h, inputs["lora_B"], case.layout, plan, inputs["out"], inplace=True)

    count = counted(step, monkeypatch)
    assert count.kernels == kernels
    assert count.operators <= 1  # the repeat of this test
