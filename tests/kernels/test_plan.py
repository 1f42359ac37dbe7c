"""The plan: the gates, the sorted slots, and no wait for the device."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from moelora_kernels import PATHS, Layout, build_plan, expand, shrink
from torch import Tensor

from tests.kernels.cases import Case, make


def test_dense_gate_adds_duplicates() -> None:
    ids = torch.tensor([[0, 2], [1, 1], [-1, 0], [-1, -1]])
    weights = torch.tensor([[0.25, 0.5], [0.25, 0.5], [torch.nan, 2.0], [1.0, torch.inf]])
    plan = build_plan(ids, weights, 3, total_rank=3, path="dense")
    gate = [[0.25, 0.0, 0.5], [0.0, 0.75, 0.0], [2.0, 0.0, 0.0], [0.0, 0.0, 0.0]]
    assert plan.gate.tolist() == gate


@given(data=st.data())
def test_sorted_slots(data: st.DataObject) -> None:
    bounds = [(0, 5), (0, 3), (0, 3), (1, 6)]
    rows, per_row, slots, experts = (data.draw(st.integers(*bound)) for bound in bounds)
    size = rows * slots
    values = data.draw(st.lists(st.integers(-1, experts - 1), min_size=size, max_size=size))
    ids = torch.tensor(values, dtype=torch.int64).view(rows, slots)
    plan = build_plan(
        ids, torch.ones(rows, slots), experts, total_rank=1, tokens_per_row=per_row, path="grouped"
    )
    order, sorted_experts, starts = plan.sorted_slots
    of_slot = ids.clamp(min=0).repeat_interleave(per_row, dim=0).flatten()
    assert order.sort()[0].tolist() == list(range(plan.num_tokens * slots))
    assert sorted_experts.tolist() == of_slot[order].tolist()
    for expert in range(experts):
        segment = order[starts[expert] : starts[expert + 1]].tolist()
        assert segment == (of_slot == expert).nonzero().flatten().tolist()


@pytest.mark.parametrize("path", PATHS)
def test_other_weights_in_the_same_plan(path: str) -> None:
    """As reentrant checkpointing needs it: the gradient goes to the weights that were put in."""
    case = Case(rows=5, tokens_per_row=2)
    ids, inputs = make(case, torch.float64)
    x, lora_A, lora_B, weights, _ = inputs.values()
    plan = build_plan(ids, weights.requires_grad_(), 3, total_rank=12, tokens_per_row=2, path=path)
    other = (2 * plan.weights.detach()).requires_grad_()

    def y(weights: Tensor) -> Tensor:
        changed = replace(plan, weights=weights)
        (h,) = shrink(x, lora_A, case.layout, changed)
        return expand(h, lora_B, case.layout, changed)

    twice = y(other)
    torch.testing.assert_close(twice, 2 * y(plan.weights))
    twice.sum().backward()
    assert other.grad is not None and other.grad.abs().sum() > 0 and weights.grad is None


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("backend", ["eager", "triton"])
@pytest.mark.parametrize("ranks", [(4, 4, 4), (1, 0, 3)], ids=str)
def test_never_waits_for_the_device(path: str, backend: str, ranks: tuple[int, ...]) -> None:
    """A meta tensor has no values: reading one, or a shape that depends on one, raises."""
    case = Case(rows=6, tokens_per_row=2, ranks=ranks)
    ids, inputs = make(case, torch.float32)
    leaves = [t.to("meta").requires_grad_() for t in inputs.values() if t is not None]
    x, lora_A, lora_B, weights, out = leaves
    plan = build_plan(
        ids.to("meta"), weights, 3, total_rank=4, tokens_per_row=2, path=path, backend=backend
    )
    layout = Layout((case.offsets,), (1.0, 2.0, 3.0), "meta")
    (h,) = shrink(x, lora_A, layout, plan)
    y = expand(h, lora_B, layout, plan, out)
    grads = torch.autograd.grad(y, leaves, torch.empty_like(y))
    assert y.shape == out.shape and [g.shape for g in grads] == [t.shape for t in leaves]


@pytest.mark.parametrize("path", PATHS)
def test_a_complete_routing_gives_the_plan_of_one_that_is_looked_through(path: str) -> None:
    ids = torch.stack([torch.randperm(5)[:2] for _ in range(7)])
    gradients = []
    for complete in (False, True):
        weights = torch.arange(14.0).view(7, 2).requires_grad_()
        plan = build_plan(ids, weights, 5, total_rank=20, path=path, complete=complete)
        used = plan.gate if path in ("dense", "matmul") else plan.weights
        (used * torch.arange(used.numel()).view_as(used)).sum().backward()
        gradients.append((used.detach(), plan.slot_experts, weights.grad))
    for looked, trusted in zip(*gradients, strict=True):
        assert looked is not None and torch.equal(looked, trusted)
