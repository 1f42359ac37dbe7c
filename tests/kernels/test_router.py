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
@pytest.mark.parametrize("tokens", [0, 1])
def test_few_tokens(tokens: int, backend: str) -> None:
    x = torch.randn(tokens, 8, requires_grad=True)
    weight = torch.randn(3, 8, requires_grad=True)
    router_logits(x, weight, backend=backend).sum().backward()
    torch.testing.assert_close(x.grad, weight.detach().sum(0).expand(tokens, -1))
    torch.testing.assert_close(weight.grad, x.detach().sum(0).expand(3, -1))


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
