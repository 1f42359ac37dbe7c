"""Frozen experts keep their bits under weight decay; freezing changes no logit, no checkpoint."""

from __future__ import annotations

import copy

import pytest
import torch
from core.mixtures import LEVELS, causal
from training.runs import assert_bits, batch, bits, gradients, of_router, rows_of, train, trainer

from moelora import MoeLoraForCausalLM

DECAY = {"weight_decay": 0.5, "learning_rate": 0.05, "max_steps": 3}


def _blocks(model, expert):
    """A copy of one expert's factors in every linear."""
    factors = model.moelora.expert(expert).values()
    return [tensor.clone() for own in factors for tensor in (own.A, own.B)]


def _changed(before, after):
    return [not torch.equal(a, b) for a, b in zip(before, after)]


@pytest.mark.parametrize("optimizer", ["adamw_torch", "adamw_torch_fused", "sgd"])
@pytest.mark.parametrize("level", LEVELS)
def test_frozen_experts_keep_their_bits_and_all_others_change(level, optimizer, tmp_path):
    model = causal(routing_level=level, r=[2, 3, 4, 5])
    model.freeze_experts(["expert_1", "expert_2"])
    before = [_blocks(model, e) for e in range(4)]
    train(model, rows_of(batch(8)), tmp_path, optim=optimizer, **DECAY)
    changed = [_changed(before[e], _blocks(model, e)) for e in range(4)]
    assert all(changed[0]) and all(changed[3])
    assert not any(changed[1]) and not any(changed[2])


def test_without_freezing_weight_decay_reaches_every_expert(tmp_path):
    """Decay alone changes an expert that no token ever takes: what freezing has to keep away."""
    model = causal(router_bias_update_rate=1e-9)
    before = _blocks(model, 1)
    with torch.no_grad():
        # Expert 1's probability is always the smallest, so its gradient is zero.
        model.moelora.load.bias[:, 1] = -10.0
    run = train(model, rows_of(batch(8)), tmp_path, **DECAY)
    assert all(int(counts[:, 1].sum()) == 0 for counts in run.current)
    assert all(_changed(before, _blocks(model, 1)))


def test_frozen_rows_have_no_optimizer_state(tmp_path):
    model = causal()
    model.freeze_experts("expert_1")
    run = trainer(model, rows_of(batch(8)), tmp_path, **DECAY)
    run.train()
    numbers = sum(p.numel() for group in run.optimizer.param_groups for p in group["params"])
    experts = sum(block.numel() for e in (0, 2, 3) for block in _blocks(model, e))
    routers = sum(p.numel() for r in model.moelora.routers.values() for p in r.parameters())
    assert numbers == experts + routers


@pytest.mark.parametrize(
    "frozen", [["expert_0"], ["expert_1", "expert_3"], [f"expert_{e}" for e in range(4)]]
)
def test_freezing_changes_no_logit_and_no_byte_of_the_state_dict(frozen):
    model = causal(r=[2, 3, 4, 5])
    before, logits = bits(model), model(**batch()).logits
    model.freeze_experts(frozen)
    assert_bits(bits(model), before)
    assert torch.equal(model(**batch()).logits, logits)


@torch.no_grad()
def _stepped(model):
    """Every expert after a step of plain gradient descent."""
    with torch.enable_grad():
        gradients(model, **batch())
    for parameter in model.parameters():
        if parameter.grad is not None:
            parameter -= parameter.grad
    return [_blocks(model, e) for e in range(4)]


def test_the_others_gradients_are_as_without_freezing():
    model = causal(r=[2, 3, 4, 5])
    frozen = copy.deepcopy(model)
    frozen.freeze_experts("expert_2")
    before = _blocks(model, 2)
    whole = _stepped(model)
    found = _stepped(frozen)
    for e in (0, 1, 3):
        torch.testing.assert_close(found[e], whole[e], rtol=0, atol=1e-6)
    assert all(_changed(before, whole[2])) and not any(_changed(before, found[2]))


def test_unfrozen_experts_train_again(tmp_path):
    model = causal()
    model.freeze_experts(["expert_0", "expert_1"])
    model.unfreeze_experts("expert_0")
    before = [_blocks(model, e) for e in range(2)]
    train(model, rows_of(batch(8)), tmp_path, **DECAY)
    assert all(_changed(before[0], _blocks(model, 0)))
    assert not any(_changed(before[1], _blocks(model, 1)))


def test_with_all_experts_frozen_only_routers_train(tmp_path):
    model = causal()
    model.freeze_experts(model.moelora_config.expert_names)
    assert all(of_router(name) for name, p in model.named_parameters() if p.requires_grad)
    before = bits(model)
    train(model, rows_of(batch(8)), tmp_path, **DECAY)
    changed = [n for n, tensor in bits(model).items() if not torch.equal(tensor, before[n])]
    assert all(of_router(name) or ".load." in name for name in changed)
    assert any(of_router(name) for name in changed)


def test_a_checkpoint_of_frozen_experts_loads_into_one_without(tmp_path):
    model = causal(r=[2, 3, 4, 5])
    model.freeze_experts(["expert_1"])
    model.save_pretrained(tmp_path)
    restored = MoeLoraForCausalLM.from_pretrained(str(tmp_path), base=causal(active=False).unload())
    assert_bits(bits(restored), bits(model))


@pytest.mark.parametrize("method", ["freeze_experts", "unfreeze_experts"])
def test_unknown_experts_are_refused_and_nothing_changes(method):
    model = causal()
    model.freeze_experts("expert_3")
    (frozen,) = {factor.frozen_experts for factor in model.moelora.factors()}
    with pytest.raises(ValueError, match=r"'law'.*expert_0, expert_1, expert_2, expert_3"):
        getattr(model, method)(["expert_3", "expert_0", "law"])
    assert {factor.frozen_experts for factor in model.moelora.factors()} == {frozen}
    assert frozen == {3}
