"""A router's logits: fp32 accuracy from 16-bit activations, all gradients, and no cast copy of x
kept.
"""

from __future__ import annotations

import pytest
import torch
from moelora_kernels import BACKENDS, router_logits
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from tests.kernels.cases import HALVES, INTERPRETED

EVERY = [name for name in BACKENDS if (name == "triton") == INTERPRETED]
every = pytest.mark.parametrize("backend", EVERY)


@every
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("size", [1e-4, 1.0, 1e3], ids=str)
def test_values_and_gradients(size: float, dtype: torch.dtype, backend: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(70, 40).to(dtype).requires_grad_()
    weight = (torch.randn(5, 40) * size).requires_grad_()
    dlogits = torch.randn(70, 5) * torch.logspace(-6, 0, 70)[:, None]
    logits = router_logits(x, weight, backend=backend)
    wanted = torch.nn.functional.linear(x.double(), weight.double())
    assert logits.dtype == torch.float32
    assert_near(logits, wanted, 1e-6)
    dx, dweight = torch.autograd.grad(logits, (x, weight), dlogits)
    wanted_dx, wanted_dweight = torch.autograd.grad(wanted, (x, weight), dlogits.double())
    assert dx.dtype == dtype and dweight.dtype == torch.float32
    assert_near(dx, wanted_dx, 1e-6 if dtype == torch.float32 else 16 * torch.finfo(dtype).eps)
    assert_near(dweight, wanted_dweight, 1e-6)


@every
def test_the_chosen_experts_are_those_of_fp32(backend: str) -> None:
    """Logits rounded to 16 bits would tie, and tokens go elsewhere."""
    torch.manual_seed(0)
    x, weight = torch.randn(200, 64).to(HALVES[0]), torch.randn(4, 64).repeat(2, 1)
    weight[4:] += 1e-5 * torch.randn(4, 64)
    chosen = router_logits(x, weight, backend=backend).argmax(1)
    exact = (x.double() @ weight.double().T).argmax(1)
    assert (chosen == exact).float().mean() > 0.99


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("tokens", [0, 1])
def test_few_tokens(tokens: int, dtype: torch.dtype, backend: str) -> None:
    x = torch.ones(tokens, 8, dtype=dtype, requires_grad=True)
    weight = torch.ones(3, 8, requires_grad=True)
    logits = router_logits(x, weight, backend=backend)
    assert torch.equal(logits, torch.full((tokens, 3), 8.0))
    logits.sum().backward()
    assert weight.grad is not None and weight.grad.dtype == torch.float32
    assert torch.equal(weight.grad, torch.full((3, 8), float(tokens)))
    if dtype != torch.bfloat16 or not INTERPRETED:  # which multiplies bf16 wrongly
        assert x.grad is not None and torch.equal(x.grad, torch.full_like(x, 3.0))


@every
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize(("tokens", "experts"), [(600, 5), (40, 70), (3, 1030)])
def test_every_size_is_exact_to_fp32(
    tokens: int, experts: int, dtype: torch.dtype, backend: str
) -> None:
    """The error of each logit and gradient, over the sum of its terms' sizes."""
    torch.manual_seed(0)
    x = torch.randn(tokens, 96).to(dtype)
    weight = torch.randn(experts, 96, requires_grad=True)
    dlogits = torch.randn(tokens, experts)
    logits = router_logits(x, weight, backend=backend)
    (dweight,) = torch.autograd.grad(logits, weight, dlogits)
    wide = x.double()
    for got, a, b in ((logits, wide, weight.double().T), (dweight, dlogits.double().T, wide)):
        error = (got.double() - a @ b).abs() / (a.abs() @ b.abs())
        assert error.max() < 3e-7


@pytest.mark.skipif(INTERPRETED, reason="not a kernel")
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
def test_tf32_does_not_touch_eager_logits(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A GPU that rounds what it multiplies to TF32, as far as a CPU can play one."""

    def as_tf32(values: Tensor) -> Tensor:
        rounded = values.contiguous().view(torch.int32) + (1 << 12)
        return (rounded & -(1 << 13)).view(torch.float32)

    mm = torch.mm
    linear = torch.nn.functional.linear
    monkeypatch.setattr(torch, "mm", lambda a, b: mm(as_tf32(a), as_tf32(b)))
    monkeypatch.setattr(
        torch.nn.functional, "linear", lambda x, weight: linear(as_tf32(x), as_tf32(weight))
    )
    torch.manual_seed(0)
    x = torch.randn(50, 96).to(dtype).requires_grad_()
    weight = torch.randn(5, 96, requires_grad=True)
    dlogits = torch.randn(50, 5)
    errors = []
    for on_gpu in (False, True):
        monkeypatch.setattr("moelora_kernels.router._rounds", lambda tensor, gpu=on_gpu: gpu)
        logits = router_logits(x, weight, backend="eager")
        dx, dweight = torch.autograd.grad(logits, (x, weight), dlogits)
        exact = (x.double() @ weight.double().T, dlogits.double().T @ x.double())
        wanted_dx = dlogits.double() @ weight.double()
        tolerance = 1e-6 if dtype == torch.float32 else torch.finfo(dtype).eps
        dx_error = (dx.double() - wanted_dx).abs().max() / wanted_dx.abs().max() / tolerance
        got = [
            (a.double() - b).abs().max() / b.abs().max() for a, b in zip((logits, dweight), exact)
        ]
        errors.append((float(max(got)), float(dx_error)))
    assert errors[0][0] > 1e-4, "the stand-in rounds nothing: no test"
    assert errors[1][0] < 1e-6 and errors[1][1] <= 1


def test_three_bf16_numbers_are_an_fp32_one() -> None:
    """`three_parts` of the kernel, which multiplies each exactly; the interpreter cannot."""
    torch.manual_seed(0)
    sizes = torch.logspace(-30, 30, 61)[:, None]
    values = torch.cat([torch.randn(61, 1000) * sizes, torch.zeros(61, 1)], dim=1)
    high = values.bfloat16()
    rest = values - high.float()
    middle = rest.bfloat16()
    low = (rest - middle.float()).bfloat16()
    total = high.double() + middle.double() + low.double()
    assert torch.equal(total, values.double())


@every
def test_only_x_itself_is_kept(backend: str) -> None:
    x = torch.randn(6, 8).half().requires_grad_()
    weight = torch.randn(3, 8, requires_grad=True)
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        router_logits(x, weight, backend=backend)
    assert {t.data_ptr() for t in kept} == {x.data_ptr(), weight.data_ptr()}


def test_mistakes_are_named() -> None:
    with pytest.raises(
        TypeError, match="weight torch.float16, expected floating point and torch.float32"
    ):
        router_logits(torch.zeros(2, 3), torch.zeros(4, 3).half())
    with pytest.raises(ValueError, match=r"x is \(1, 2, 3\) on cpu and weight \(4, 3\)"):
        router_logits(torch.zeros(1, 2, 3), torch.zeros(4, 3))
    with pytest.raises(ValueError, match="backend='cuda' is unknown"):
        router_logits(torch.zeros(2, 3), torch.zeros(4, 3), backend="cuda")


def assert_near(actual: Tensor, wanted: Tensor, tolerance: float) -> None:
    error = (actual.double() - wanted).abs().max() / wanted.abs().max()
    assert error <= tolerance, f"error {error:.1e}"
