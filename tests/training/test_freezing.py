"""Frozen experts keep their bits under weight decay; freezing changes no logit and no checkpoint."""

from __future__ import annotations

import pytest
import torch
from core.mixtures import LEVELS, causal
from training.runs import assert_bits, batch, bits, gradients, rows_of, train, trainer

DECAY = {"weight_decay": 0.5, "learning_rate": 0.05, "max_steps": 3}


def _blocks(model, expert):
    """One expert's rows in every factor of the state dict."""
    return [
        factor.stacked().detach()[rows].clone()
        for factor in model.moelora.factors()
        for rows in factor.expert_rows(expert)
    ]


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
    frozen = sum(block.numel() for block in _blocks(model, 1))
    everything = sum(f.stacked().numel() for f in model.moelora.factors())
    routers = sum(p.numel() for p in model.moelora.routers.parameters())
    assert numbers == everything - frozen + routers


@pytest.mark.parametrize(
    "frozen", [["expert_0"], ["expert_1", "expert_3"], [f"expert_{e}" for e in range(4)]]
)
def test_freezing_changes_no_logit_and_no_byte_of_the_state_dict(frozen):
    model = causal(r=[2, 3, 4, 5])
    before, logits = bits(model), model(**batch()).logits
    model.freeze_experts(frozen)
    assert_bits(bits(model), before)
    assert torch.equal(model(**batch()).logits, logits)


def test_the_others_gradients_are_as_without_freezing():
    model = causal(r=[2, 3, 4, 5])
    names = [name for name, _ in model.moelora.named_modules()]
    whole = gradients(model, **batch())
    model.freeze_experts("expert_2")
    found = gradients(model, **batch())
    for name in names:
        factor = model.moelora.get_submodule(name)
        key = f"moelora.{name}.rows"
        if key not in whole:
            continue
        kept = [whole[key][rows] for e in (0, 1, 3) for rows in factor.expert_rows(e)]
        assert found[key].shape[0] == sum(len(rows) for rows in kept) < whole[key].shape[0]
        # Blocks keep their order: linear after linear, in each expert after expert.
        parts = whole[key].split(list(factor.blocks))
        expected = torch.cat([part for e, part in zip(factor.experts, parts) if e != 2])
        torch.testing.assert_close(found[key], expected, rtol=0, atol=1e-6)


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
    assert all(
        name.startswith("moelora.routers.")
        for name, p in model.named_parameters()
        if p.requires_grad
    )
    before = bits(model)
    train(model, rows_of(batch(8)), tmp_path, **DECAY)
    for name, tensor in model.state_dict().items():
        trained = name.startswith(("moelora.routers.", "moelora.load."))
        assert trained or torch.equal(tensor, before[name]), name
    assert any(
        not torch.equal(t, before[n]) for n, t in model.state_dict().items() if "routers" in n
    )


def test_a_checkpoint_of_frozen_experts_loads_into_one_without(tmp_path):
    model = causal(r=[2, 3, 4, 5])
    model.freeze_experts(["expert_1"])
    model.save_pretrained(tmp_path)
    restored = (
        type(model).__bases__[0].from_pretrained(str(tmp_path), base=causal(active=False).unload())
    )
    assert_bits(bits(restored), bits(model))


@pytest.mark.parametrize("method", ["freeze_experts", "unfreeze_experts"])
def test_unknown_experts_are_refused_and_nothing_changes(method):
    model = causal()
    model.freeze_experts("expert_3")
    frozen = model._frozen()
    with pytest.raises(ValueError, match=r"'law'.*expert_0, expert_1, expert_2, expert_3"):
        getattr(model, method)(["expert_3", "expert_0", "law"])
    assert model._frozen() == frozen == {3}
