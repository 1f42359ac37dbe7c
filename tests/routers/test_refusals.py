"""What a kind of router cannot follow is refused when the configuration is made; and how many
experts a token uses where the router decides that.
"""

from __future__ import annotations

import pytest
import torch
from bases import causal_base
from core.mixtures import LEVELS, SCOPES, causal, prompt_mask, tokens
from training.tasks import gate, tasks

from moelora import ROUTERS, MoeLoraConfig, MoeLoraForCausalLM
from moelora.training import train_gate
from moelora.training.fitting import only_training

DECIDING = sorted(name for name, cls in ROUTERS.items() if cls.decides_how_many)


@pytest.mark.parametrize("router", ["soft", "threshold", "sparsegen", "random"])
def test_a_bias_cannot_balance_who_does_not_choose_by_rank(router):
    with pytest.raises(ValueError, match=f"router_bias_update_rate=0.01.*'{router}'.*aux_loss"):
        MoeLoraConfig(router=router, router_bias_update_rate=0.01)


@pytest.mark.parametrize("router", ["top_p", "threshold", "sparsegen"])
def test_the_null_expert_cannot_be_told_from_slots_that_stay_empty(router):
    with pytest.raises(ValueError, match=f"null_expert.*'{router}'.*'top_k' or 'soft'"):
        MoeLoraConfig(router=router, null_expert=True)


def test_soft_uses_all_experts():
    with pytest.raises(ValueError, match=r"num_experts_per_tok=2, but .* all 8 .*top_p"):
        MoeLoraConfig(router="soft", num_experts_per_tok=2)
    assert MoeLoraConfig(router="soft", num_experts_per_tok=8).num_experts_per_tok == 8


@pytest.mark.parametrize(
    "field",
    [
        {"norm_topk_prob": False},
        {"router_input_norm": True},
        {"router_jitter_noise": 0.1},
        {"router_pooling": "last", "routing_level": "sequence"},
    ],
)
def test_random_reads_nothing(field):
    with pytest.raises(ValueError, match=f"{next(iter(field))}.*'random' reads nothing"):
        MoeLoraConfig(router="random", **field)


@pytest.mark.parametrize(
    ("router", "option", "wrong"),
    [
        ("soft", "temperature", 0.0),
        ("top_p", "p", 0.0),
        ("top_p", "p", 1.1),
        ("threshold", "max_threshold", 1.0),
        ("sparsegen", "sparsity", 1.0),
        ("sparsegen", "hidden_size", 0),
        ("cosine", "hidden_size", 0),
        ("cosine", "temperature", 0.001),
    ],
)
def test_options_out_of_range(router, option, wrong):
    with pytest.raises(ValueError, match=option):
        MoeLoraConfig(router=router, router_options={option: wrong})
    if option == "sparsity":
        options = {"sparsity": 0.995, "predicts_sparsity": True}
        with pytest.raises(ValueError, match="sparsity"):
            MoeLoraConfig(router=router, router_options=options)


def test_nothing_teaches_a_router_without_parameters():
    model = gate(router="random", router_input_norm=False)
    with pytest.raises(ValueError, match=r"'random' has no parameters.*another router"):
        train_gate(model, tasks(4))
    with pytest.raises(ValueError, match="'random' has no parameters"):
        only_training(model, "red", routers=True).__enter__()
    model = causal(router="random").train()
    targets = torch.zeros(2, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"expert_targets teach.*'random'"):
        model(tokens(), labels=tokens(), expert_targets=targets)


@pytest.mark.parametrize("router", sorted(ROUTERS))
def test_two_experts_a_token_are_the_default_or_all_where_the_router_decides(router):
    for null_expert in {False, ROUTERS[router].takes_null_expert}:
        config = MoeLoraConfig(num_experts=5, router=router, null_expert=null_expert)
        assert config.num_experts_per_tok == (5 if router in DECIDING else 2)
        assert MoeLoraConfig.from_dict(config.to_dict()).num_experts_per_tok == (
            config.num_experts_per_tok
        )


@pytest.mark.parametrize("router", DECIDING)
def test_all_stays_all_when_experts_come_and_go(router, tmp_path):
    model = causal(router=router, num_experts_per_tok=None)
    for change in (lambda: model.add_expert("law"), lambda: model.remove_expert("expert_0")):
        change()
        experts = model.moelora_config.num_experts
        assert model.moelora_config.num_experts_per_tok == experts
        routing = model(tokens(), output_expert_routing=True).expert_routing[0]
        assert routing.expert_ids.shape == (20, experts)
    for name in ("law", "expert_1", "expert_2"):
        model.remove_expert(name)
    assert model.moelora_config.num_experts_per_tok == 1
    model.add_expert("more")
    logits = model(tokens()).logits
    model.save_pretrained(tmp_path)
    again = MoeLoraForCausalLM.from_pretrained(tmp_path, base=causal_base())
    assert again.moelora_config.num_experts_per_tok == 2
    assert torch.equal(again(tokens()).logits, logits)


def test_a_limit_stays_until_there_are_no_more_experts_than_it():
    model = causal(router="sparsegen", num_experts_per_tok=3)
    model.add_expert("law")
    assert model.moelora_config.num_experts_per_tok == 3
    for name in ("law", "expert_0", "expert_1"):
        model.remove_expert(name)
    assert model.moelora_config.num_experts_per_tok == 2
    assert model.moelora.router_list[0].num_experts_per_tok == 2
    again = model(tokens(), output_expert_routing=True).expert_routing[0]
    assert again.expert_ids.shape == (20, 2)


def test_a_limit_may_change_when_loading(tmp_path):
    model = causal(router="top_p", num_experts_per_tok=None)
    model.save_pretrained(tmp_path)
    for given, expected in ((1, 1), (None, 4)):
        again = MoeLoraForCausalLM.from_pretrained(
            tmp_path, base=causal_base(), num_experts_per_tok=given, router_options={"p": 0.9}
        )
        assert again.moelora_config.num_experts_per_tok == expected
        assert again.moelora.router_list[0].options.p == 0.9


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("scope", SCOPES)
def test_a_control_without_parameters_trains_its_experts(scope, level):
    model = causal(router="random", router_scope=scope, routing_level=level).train()
    ids = tokens()
    labels = ids.masked_fill(prompt_mask(ids, 4), -100)
    first = model(ids, labels=labels)
    first.loss.backward()
    assert not list(model.moelora.routers.parameters())
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert bool(parameter.grad.isfinite().all()) and bool(parameter.grad.any()), name
    assert not torch.equal(model(ids, labels=labels).logits, first.logits)
    report = model.eval().route(input_ids=ids)
    torch.testing.assert_close(report.expert_share, torch.full((4,), 0.25))
