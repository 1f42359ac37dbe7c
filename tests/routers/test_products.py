"""No product of a router is rounded to TF32, which a GPU does where torch is told to."""

from __future__ import annotations

import copy

import pytest
import torch
from core.mixtures import POOLING_ROUTERS, rows_for, suited
from torch.utils._python_dispatch import TorchDispatchMode

from moelora import ROUTERS, MoeLoraConfig
from moelora.config_checks import ROUTER_POOLINGS
from moelora.routers import products

D = 96
aten = torch.ops.aten
# Those that have products: the hidden states' and contexts' readers with parameters.
MULTIPLYING = [
    router
    for router in sorted(ROUTERS)
    if ROUTERS[router].reads != "input_ids" and router != "random"
]


class RoundsProducts(TorchDispatchMode):
    """A GPU that rounds what it multiplies as matrices to TF32, as far as a CPU can play one."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (aten.mm.default, aten.bmm.default, aten.addmm.default):
            args = [_as_tf32(own) if own.dtype == torch.float32 else own for own in args]
        return func(*args, **(kwargs or {}))


def _as_tf32(values):
    rounded = values.contiguous().view(torch.int32) + (1 << 12)
    return (rounded & -(1 << 13)).view(torch.float32)


@pytest.fixture
def on_gpu(monkeypatch):
    monkeypatch.setattr("moelora_kernels.router._rounds", lambda tensor: True)
    monkeypatch.setattr(products, "_is_exact", lambda tensor: False)


def made(router, **fields):
    torch.manual_seed(0)
    options = {"sparsegen": {"predicts_sparsity": True}, "context": {"hidden_size": 24}}
    fields |= {"router": router, "router_options": options.get(router)}
    one = ROUTERS[router](MoeLoraConfig(**suited(num_experts=5, **fields)), D).eval()
    for parameter in one.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    return one


def error(got, exact):
    got = got.detach().double()
    return float((got - exact.detach()).abs().max() / exact.detach().abs().max())


def routed(router, x):
    """The logits, the weights, and the gradients of all parameters."""
    routing = router(x)
    used = routing.expert_weights.square().sum() + routing.logits.sin().sum()
    gradients = torch.autograd.grad(used, list(router.parameters()), allow_unused=True)
    return routing.logits, routing.expert_weights, *(g for g in gradients if g is not None)


@pytest.mark.parametrize("router", MULTIPLYING)
def test_no_logit_and_no_weight_and_no_gradient_is_rounded(router, on_gpu):
    one = made(router)
    x = rows_for(one, 40)
    exact = routed(copy.deepcopy(one).double(), x.double())
    with RoundsProducts():
        a = torch.randn(8, D)
        b = torch.randn(D, 8)
        assert error(a @ b, a.double() @ b.double()) > 1e-4, "the stand-in rounds nothing: no test"
        found = routed(one, x)
    assert len(found) == len(exact) > 2
    for got, wanted in zip(found, exact, strict=True):
        assert error(got, wanted) < 3e-5


@pytest.mark.parametrize("pooling", ROUTER_POOLINGS)
def test_no_pooled_prompt_is_rounded(pooling, on_gpu):
    one = made(POOLING_ROUTERS[0], router_pooling=pooling, routing_level="sequence")
    x = torch.randn(3, 7, D)
    mask = torch.arange(7)[None] < torch.tensor([[7], [4], [1]])
    with RoundsProducts(), torch.no_grad():
        got = one.pool(x, mask)
    with torch.no_grad():
        assert error(got, copy.deepcopy(one).double().pool(x.double(), mask)) < 1e-6
