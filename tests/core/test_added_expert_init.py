"""expert_init of an expert that joins others: its A begins as theirs did, with room of its own."""

from __future__ import annotations

import pytest
import torch
from bases import causal_base
from core.mixtures import expert_parameters, tokens
from core.test_expert_init import INITS, assert_inside, made, weight_of


def in_use(init, base="llama", **fields):
    """A mixture as if it had been trained: every A a little turned, every B far from 0."""
    model = made(init, causal_base(base), **fields)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in expert_parameters(model).items():
            size = 0.01 if "lora_A" in name else 0.1
            parameter.add_(size * torch.randn_like(parameter))
    return model


def as_of(model, expert, linear):
    return model.moelora.expert(expert)[linear].A


@pytest.mark.parametrize("base", ["llama", "gpt2"])
@pytest.mark.parametrize("init", INITS)
def test_a_fresh_expert_begins_as_expert_init_says(init, base):
    model = in_use(init, base)
    twin = in_use(init, base)
    twin.freeze_experts("expert_1")
    for own in (model, twin):
        own.add_expert("new", r=3, seed=5)
    for linear in model.moelora.linears():
        A = as_of(model, 4, linear)
        assert torch.equal(A, as_of(twin, 4, linear))
        torch.testing.assert_close(A @ A.T, torch.eye(3) / 3, rtol=0, atol=1e-5)
        others = torch.cat([as_of(model, e, linear) for e in range(4)])
        if init == "orthogonal":
            assert float((A @ others.T).abs().max()) < 1e-6
            continue
        Vh = torch.linalg.svd(weight_of(model.get_submodule(linear)), full_matrices=False).Vh
        # The four begin a fourth of the spectrum apart, each with two vectors of it.
        gap = len(Vh) // 4
        free = [i for i in range(len(Vh)) if i % gap >= 2 or i >= 4 * gap]
        assert_inside(A, Vh[free[:3]])
    with model.use_experts("new"), torch.no_grad():
        assert torch.equal(model(tokens()).logits, causal_base(base)(tokens()).logits)


@pytest.mark.parametrize("init", INITS)
def test_a_replacement_takes_the_room_of_what_it_replaces(init):
    model = in_use(init, r=8)
    linear = "model.layers.0.mlp.gate_proj"
    with pytest.raises(ValueError, match=rf"{init}.*d_in=32.*have 32 rows.*smaller r.*'kaiming'"):
        model.add_expert("new")
    assert model.moelora.num_experts == 4
    model.replace_expert("expert_2", seed=0)
    others = torch.cat([as_of(model, e, linear) for e in (0, 1, 3)])
    A = as_of(model, 2, linear)
    torch.testing.assert_close(A @ A.T, torch.eye(8) / 3, rtol=0, atol=1e-5)
    # Of 32 directions the others, a little turned, leave these.
    assert float((A @ others.T).abs().max()) < (1e-6 if init == "orthogonal" else 0.1)
    model.moelora_config.expert_init = "kaiming"
    model.add_expert("new", seed=0)
    assert model.moelora.num_experts == 5


@pytest.mark.parametrize("init", INITS)
def test_copies_take_no_room_of_their_own_and_a_shared_A_stays(init):
    model = in_use(init)
    model.add_expert("copy", copy_of="expert_0")
    model.add_expert("new", seed=0)
    for linear in model.moelora.linears():
        A = as_of(model, 5, linear)
        torch.testing.assert_close(A @ A.T, torch.eye(2) / 3, rtol=0, atol=1e-5)
        assert float((A @ as_of(model, 4, linear).T).abs().max()) < 0.1
    shared = in_use(init, share_lora_A=True)
    before = {linear: as_of(shared, 0, linear).clone() for linear in shared.moelora.linears()}
    shared.add_expert("new")
    assert all(torch.equal(as_of(shared, 4, linear), A) for linear, A in before.items())


@pytest.mark.parametrize("init", INITS)
def test_experts_that_are_not_everywhere_and_one_alone(init):
    model = in_use(init, r=[2, 3, 4, 1], expert_ranks={"model.layers.0.mlp.up_proj": [0, 3, 0, 0]})
    model.add_expert("new", r=2)
    single = in_use(init, num_experts=1, num_experts_per_tok=1)
    single.replace_expert("expert_0", r=5)
    for own, expert in ((model, 4), (single, 0)):
        for linear in own.moelora.linears():
            A = as_of(own, expert, linear)
            torch.testing.assert_close(A @ A.T, torch.eye(len(A)) / 3, rtol=0, atol=1e-5)
