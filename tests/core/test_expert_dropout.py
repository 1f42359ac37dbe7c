"""Experts that are left out of rows by chance, in training alone."""

from __future__ import annotations

import pytest
import torch
from bases import causal_base
from core.dense import assert_plain_sum
from core.mixtures import LEVELS, NO_ROUTER_LOSS, SCOPES, causal, prompt_mask, tokens
from moelora_kernels import build_plan
from training.runs import assert_same, batch, gradients

from moelora import MoeLoraConfig, MoeLoraForCausalLM
from moelora.core import forward_pass
from moelora.core.choices import Choices

BY_EXPERT = [0.0, 0.25, 0.5, 0.75]


@pytest.mark.parametrize("share", [0.4, BY_EXPERT], ids=["one", "each"])
def test_rows_go_without_an_expert_as_often_as_asked_and_the_mean_stays(share):
    choices = Choices(MoeLoraConfig(num_experts=4, expert_dropout=share), [None])
    shares = torch.tensor([share] * 4 if isinstance(share, float) else share)
    ids = torch.arange(4).expand(20_000, -1).clone()
    ids[:, 1] = -1
    weights = torch.rand(20_000, 4) + 0.5
    dropped = choices.dropped(ids, weights)
    zeros = dropped == 0
    # An empty slot has the weight 0 whatever is drawn for it.
    for slot in (0, 2, 3):
        assert float(zeros[:, slot].float().mean()) == pytest.approx(float(shares[slot]), abs=0.02)
        kept = dropped[~zeros[:, slot], slot]
        expected = weights[~zeros[:, slot], slot] / (1 - shares[slot])
        torch.testing.assert_close(kept, expected)
    both = (zeros[:, 2] & zeros[:, 3]).float().mean()
    assert float(both) == pytest.approx(float(shares[2] * shares[3]), abs=0.02)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("scope", SCOPES)
def test_a_training_pass_is_the_plain_sum_of_what_it_drew(scope, level, monkeypatch):
    fields = {"routing_level": level, "router_scope": scope, **NO_ROUTER_LOSS}
    model = causal(expert_dropout=BY_EXPERT, num_shared_experts=1, **fields).train()
    plans = []

    def noting(*args, **kwargs):
        plans.append(build_plan(*args, **kwargs))
        return plans[-1]

    monkeypatch.setattr(forward_pass, "build_plan", noting)
    mask = {} if level == "token" else {"router_mask": torch.ones(2, 10, dtype=torch.bool)}
    got = model(tokens(), **mask).logits
    assert len(plans) == len(model.moelora.router_list)
    for plan in plans:
        # No slot is emptied: a row without an expert has it with the weight 0.
        assert plan.distinct and int(plan.expert_ids.min()) >= 0
        # The shared expert, whose weight is 1, stays in one of four rows.
        assert {*plan.gate[:, 3].tolist()} <= {0.0, 4.0}
    assert any(bool((plan.weights == 0).any()) for plan in plans)
    kept = 1 - torch.tensor(BY_EXPERT)
    times = [(plan.gate.detach() != 0) / kept for plan in plans]
    assert_plain_sum(model, got, times)


@torch.no_grad()
@pytest.mark.parametrize("level", LEVELS)
def test_evaluation_and_forced_experts_are_exact(level):
    model = causal(routing_level=level, expert_dropout=0.5)
    plain = causal(routing_level=level)
    assert torch.equal(model(tokens()).logits, plain(tokens()).logits)
    assert torch.equal(
        model.generate(tokens(), max_new_tokens=3), plain.generate(tokens(), max_new_tokens=3)
    )
    model.train()
    plain.train()
    ids = tokens()
    mask = {} if level == "token" else {"router_mask": prompt_mask(ids, 4)}
    assert not torch.equal(model(ids, **mask).logits, plain(ids, **mask).logits)
    with model.use_experts("expert_1"), plain.use_experts("expert_1"):
        assert torch.equal(model(ids).logits, plain(ids).logits)


@pytest.mark.parametrize("kind", [True, False], ids=["reentrant", "non_reentrant"])
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("scope", ["site", "layer", "model"])
def test_recomputing_draws_the_same(scope, level, kind):
    model = causal(routing_level=level, router_scope=scope, expert_dropout=BY_EXPERT)
    expected = gradients(model, **batch())
    model.gradient_checkpointing_enable({"use_reentrant": kind})
    assert_same(gradients(model, **batch()), expected, 1e-5)


def test_a_row_that_loses_all_its_experts_has_gradients_of_zero():
    model = causal(expert_dropout=0.999999, **NO_ROUTER_LOSS)
    out = model.train()(tokens(), labels=tokens())
    assert torch.equal(out.logits, causal_base()(tokens()).logits)
    out.loss.backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None and not bool(parameter.grad.any()), name


def test_a_checkpoint_keeps_it_and_may_be_loaded_with_another(tmp_path):
    model = causal(expert_dropout=BY_EXPERT)
    model.save_pretrained(tmp_path)
    folder = str(tmp_path)
    again = MoeLoraForCausalLM.from_pretrained(folder, base=causal_base())
    assert again.moelora_config.expert_dropout == BY_EXPERT
    other = MoeLoraForCausalLM.from_pretrained(folder, base=causal_base(), expert_dropout=0.1)
    assert other.moelora_config.expert_dropout == 0.1 and other.moelora.choices.drops
    none = MoeLoraForCausalLM.from_pretrained(folder, base=causal_base(), expert_dropout=0.0)
    assert not none.moelora.choices.drops


def test_shares_that_are_none_are_refused():
    for wrong in (1.0, -0.1, [0.1, 0.2], [0.1, 0.2, 0.3, 1.0]):
        with pytest.raises(ValueError, match="expert_dropout"):
            MoeLoraConfig(num_experts=4, expert_dropout=wrong)
    for wrong in ("0.1", None, ["0.1"] * 4):
        with pytest.raises(TypeError, match="expert_dropout"):
            MoeLoraConfig(num_experts=4, expert_dropout=wrong)
