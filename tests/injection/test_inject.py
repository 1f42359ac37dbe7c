"""Putting a mixture in and taking it out: what the base had before, it has afterwards."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from bases import causal_base
from core.mixtures import SCOPES, into
from packaging.version import Version
from training.runs import batch, gradients_of, open_window

LOSSES = {"router_aux_loss_coef": 0.5, "router_z_loss_coef": 0.1}
REENTRANT = [False, True]


def _gradients(model):
    open_window(model)
    model.train()
    model(**batch()).loss.backward()
    return gradients_of(model)


@pytest.mark.parametrize("reentrant", REENTRANT)
@pytest.mark.parametrize("scope", SCOPES)
def test_checkpointing_enabled_before_the_mixture(scope, reentrant):
    expected = _gradients(into(causal_base(), router_scope=scope, **LOSSES))
    base = causal_base()
    base.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model = into(base, router_scope=scope, **LOSSES)
    try:
        got = _gradients(model)
    except ValueError as error:
        # Older transformers checkpoint a layer with its hooks inside, which is then refused.
        assert scope == "model" and reentrant and "upgrade transformers" in str(error)
        assert Version(transformers.__version__) < Version("5.23")
        return
    for name, gradient in expected.items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("reentrant", REENTRANT)
def test_checkpointing_goes_on_after_unload_and_in_the_next_mixture(reentrant):
    base = causal_base()
    model = into(base, **LOSSES)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    base = model.unload()
    base.train()
    base.requires_grad_(True)
    base(**batch()).loss.backward()
    assert all(p.grad is not None for p in base.model.layers.parameters())
    base.zero_grad()
    got = _gradients(into(base, **LOSSES))
    for name, gradient in _gradients(into(causal_base(), **LOSSES)).items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-5, atol=1e-6)


def test_a_base_trains_after_unload_what_it_trained_before():
    base = causal_base()
    base.model.embed_tokens.requires_grad_(False)
    before = {name: p.requires_grad for name, p in base.named_parameters()}
    unloaded = into(base).unload()
    assert {name: p.requires_grad for name, p in unloaded.named_parameters()} == before


@pytest.mark.parametrize("scope", SCOPES)
def test_nothing_is_left_after_unload(scope):
    base = causal_base()
    state = copy.deepcopy(base.state_dict())
    modules = [name for name, _ in base.named_modules()]
    unloaded = into(base, router_scope=scope).unload()
    assert unloaded is base and [name for name, _ in base.named_modules()] == modules
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in base.modules())
    assert state.keys() == base.state_dict().keys()


@pytest.mark.parametrize("scope", SCOPES)
def test_experts_and_routers_lie_in_their_decoder_layer(scope):
    model = into(causal_base(), router_scope=scope)
    own = [name for name, _ in model.named_parameters() if model.moelora.owns(name)]
    assert own and all(name.startswith("model.layers.") for name in own if "lm_head" not in name)
    assert set(own) <= set(model.state_dict())


def test_an_unknown_checkpointing_is_refused_in_the_backward_pass():
    """torch's own, put around a layer by hand: its router losses would silently be lost."""
    model = into(causal_base(), **LOSSES).train()
    layer = model.model.layers[0]
    forward = layer.forward

    def checkpointed(*args, **kwargs):
        return torch.utils.checkpoint.checkpoint(forward, *args, use_reentrant=False, **kwargs)

    layer.forward = checkpointed
    model.enable_input_require_grads()
    with pytest.raises(RuntimeError, match="gradient_checkpointing_enable"):
        model(**batch()).loss.backward()
