"""Factors in the dtype of the activations are made anew in every step, so they are never stale."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from moelora_kernels import PATHS, build_plan, expand, shrink
from moelora_kernels.triton import autograd
from torch import Tensor, nn

from tests.kernels.cases import Case, assert_close, expected, make, mixture, run

CASE = Case(rows=5, ranks=(2, 5, 3))


class Mixture(nn.Module):
    """Factors in fp32, everything else in fp16."""

    def __init__(self, path: str):
        super().__init__()
        self.ids, inputs = make(CASE, torch.float32)
        self.x, self.out = inputs["x"].half(), inputs["out"].half()
        self.weights, self.path = inputs["weights"], path
        self.lora_A = nn.Parameter(inputs["lora_A"])
        self.lora_B = nn.Parameter(inputs["lora_B"])

    def forward(self) -> Tensor:
        function = mixture(CASE, self.ids, path=self.path, backend="triton")
        return function(self.x, self.lora_A, self.lora_B, self.weights, self.out)

    def fresh(self) -> Tensor:
        """What a module made now of the same numbers gives."""
        other = Mixture(self.path)
        for name in ("lora_A", "lora_B"):
            getattr(other, name).data = getattr(self, name).detach().clone()
        return other()


def optimizer_step(module: Mixture) -> None:
    for p in module.parameters():
        p.grad = torch.ones_like(p)
    torch.optim.AdamW(module.parameters(), lr=0.5).step()


def load(module: Mixture) -> None:
    module.load_state_dict({n: p + 1 for n, p in module.state_dict().items()})


def load_by_assignment(module: Mixture) -> None:
    module.load_state_dict({n: p + 1 for n, p in module.state_dict().items()}, assign=True)


def freeze(module: Mixture) -> None:
    module.requires_grad_(False)
    module.lora_A.add_(1)


def write_data(module: Mixture) -> None:
    module.lora_A.data.add_(1)  # which no version counter sees
    module.lora_B.data = module.lora_B.data + 1


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    "change",
    [optimizer_step, load, load_by_assignment, freeze, write_data],
    ids=lambda f: f.__name__,
)
def test_never_stale(
    change: Callable[[Mixture], None], path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(autograd, "TOKENS_TO_CAST_FOR", 1)
    module = Mixture(path)
    before = module()
    change(module)
    after = module()
    assert not torch.equal(after, before)
    assert torch.equal(after, module.fresh())


@pytest.mark.parametrize("path", PATHS)
def test_a_backward_pass_has_the_factors_of_its_forward_pass(
    path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As gradient accumulation wants it, though a step may lie between; a cast copy is kept."""
    monkeypatch.setattr(autograd, "TOKENS_TO_CAST_FOR", 1)
    ids, inputs = make(CASE, torch.float32)
    halves = {n: t.half() if n in ("x", "out") else t for n, t in inputs.items()}
    function = mixture(CASE, ids, path=path, backend="triton")
    wanted = run(function, halves)

    def changed_between(lora_A: Tensor, lora_B: Tensor, **others: Tensor) -> Tensor:
        y = function(lora_A=lora_A, lora_B=lora_B, **others)
        lora_A.data.zero_()
        lora_B.data.zero_()
        return y

    for name, value in run(changed_between, {n: t.clone() for n, t in halves.items()}).items():
        assert torch.equal(value, wanted[name]), name


@pytest.mark.parametrize("path", PATHS)
def test_a_backward_pass_under_autocast(path: str) -> None:
    """Its products are of the dtypes of the forward pass."""
    ids, inputs = make(CASE, torch.float32)
    leaves = {n: t.requires_grad_() for n, t in inputs.items()}
    y = mixture(CASE, ids, path=path, backend="triton")(**leaves)
    with torch.autocast("cpu", dtype=torch.float16):
        y.sum().backward()
    leaves_again = {n: t.detach().clone().requires_grad_() for n, t in inputs.items()}
    mixture(CASE, ids, path=path, backend="triton")(**leaves_again).sum().backward()
    for name, leaf in leaves.items():
        assert torch.equal(leaf.grad, leaves_again[name].grad), name


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("ids", ["none", "random"])
def test_rows_of_empty_slots_and_no_slots(path: str, ids: str) -> None:
    """dh, and the weights' gradients, are written where nothing is chosen."""
    for slots in (0, 2):
        case = Case(rows=3, tokens_per_row=2, num_slots=slots, ids=ids)
        chosen, inputs = make(case, torch.float32)
        torch.use_deterministic_algorithms(True)  # fills what torch.empty gives with NaN
        try:
            actual = run(mixture(case, chosen, path=path, backend="triton"), inputs)
        finally:
            torch.use_deterministic_algorithms(False)
        assert_close(actual, expected(case, chosen, inputs), torch.float32)


@pytest.mark.parametrize("path", PATHS)
def test_into_the_output_of_a_linear(path: str) -> None:
    """A base's output is fresh and a view, and its own weight learns too."""
    ids, inputs = make(CASE, torch.float32)
    weight = torch.randn(CASE.d_out, CASE.d_in)
    grads = []
    for inplace in (False, True):
        leaves = {n: t.detach().requires_grad_() for n, t in inputs.items() if n != "out"}
        base = weight.clone().requires_grad_()
        out = nn.functional.linear(leaves["x"].view(1, 5, -1), base, torch.zeros(CASE.d_out))
        y = into(out, leaves, ids, path, inplace)
        assert y.shape == (1, 5, CASE.d_out)
        assert (y.data_ptr() == out.data_ptr()) == inplace
        (y * torch.arange(y.numel()).view(y.shape)).sum().backward()
        grads.append([base.grad, *(leaf.grad for leaf in leaves.values())])
    for fresh, written in zip(*grads, strict=True):
        torch.testing.assert_close(written, fresh)


def into(out: Tensor, leaves: dict[str, Tensor], ids: Tensor, path: str, inplace: bool) -> Tensor:
    plan = build_plan(ids, leaves["weights"], 3, total_rank=10, path=path, backend="triton")
    (h,) = shrink(leaves["x"].view(1, 5, -1), leaves["lora_A"], CASE.layout, plan)
    return expand(h, leaves["lora_B"], CASE.layout, plan, out, inplace=inplace)
