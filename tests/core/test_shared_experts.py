"""Experts that act on every token beside those that routers choose (arXiv:2401.06066)."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
from bases import causal_base
from core.dense import assert_plain_sum
from core.mixtures import LEVELS, NO_ROUTER_LOSS, SCOPES, causal, left_padded, tokens
from training.runs import assert_bits, assert_same, batch, bits, gradients, open_window

from moelora import MoeLoraConfig, MoeLoraForCausalLM
from moelora.config import NO_EXPERT
from moelora.expert_pool import resume_optimizer
from moelora.training.evaluation import alone
from moelora.training.router_init import initialise

CLOSE = {"rtol": 1e-4, "atol": 1e-5}
# For each scope other settings, so that all are tried without trying all together.
SETTINGS = {
    "projection": {},
    "site": {"null_expert": True},
    "layer": {"num_experts_per_tok": 1},
    "model": {"null_expert": True, "num_experts_per_tok": 1},
}
NAMES = [f"expert_{e}" for e in range(4)]


def shared(count: int = 1, **fields):
    return causal(num_shared_experts=count, **fields)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("scope", SCOPES)
def test_a_mixture_is_the_plain_sum_with_all_gradients(scope, level):
    fields = {"router_scope": scope, "routing_level": level, **SETTINGS[scope]}
    model = shared(2, **NO_ROUTER_LOSS, **fields)
    assert_plain_sum(model, model(tokens()).logits)


@torch.no_grad()
def test_forcing_takes_what_it_names_and_no_more():
    model = shared()
    plain = causal()
    for site, own in zip(plain.moelora.sites.values(), model.moelora.sites.values()):
        for factor, like in zip(site.factors(), own.factors()):
            factor.fill(like.stacked())
    for weights in ({"expert_1": 0.5}, {"expert_3": 1.0}, {"expert_0": 1.0, "expert_3": -2.0}):
        with model.use_experts(weights), plain.use_experts(weights):
            assert torch.equal(model(tokens()).logits, plain(tokens()).logits)
    given = torch.tensor([0.0, 1.0, 0.0, 0.5])
    expected = plain(tokens(), expert_weights=given).logits
    assert torch.equal(model(tokens(), expert_weights=given).logits, expected)


@torch.no_grad()
@pytest.mark.parametrize("level", LEVELS)
def test_a_ban_may_name_a_shared_expert(level):
    model = shared(2, routing_level=level)
    with_one = copy.deepcopy(model)
    for factor in (site.lora_B for site in with_one.moelora.sites.values()):
        for lora_B in factor:
            lora_B.block(0, 2).zero_()
    with model.use_experts(ban="expert_2"):
        torch.testing.assert_close(model(tokens()).logits, with_one(tokens()).logits, **CLOSE)
    with pytest.raises(ValueError, match=r"All experts are banned \(expert_0, expert_1\)"):
        model(tokens(), banned_experts=["expert_0", "expert_1"])
    with model.use_experts(ban=["expert_2", "expert_3"]):
        # Another null-expert number than the first shared expert's: nothing is banned for targets.
        model(tokens(), expert_targets=torch.tensor([0, 1]))


@torch.no_grad()
def test_routers_losses_and_counts_know_the_routed_experts_alone():
    model = shared(router_scope="model", null_expert=True)
    (router,) = model.moelora.router_list
    assert router.weight.shape[0] == router.num_choices == 4 and router.num_experts == 3
    load = model.moelora.load
    assert load.current.shape == (1, 4)
    open_window(model)
    with torch.enable_grad():
        out = model.train()(tokens(), labels=tokens(), output_expert_routing=True)
    assert int(load.current.sum()) == 2 * tokens().numel()
    assert int(out.expert_routing[0].expert_ids.max()) <= 2
    report = model.eval().route(input_ids=tokens())
    assert report.choice_names == [*NAMES[:3], NO_EXPERT] and report.shared_experts == ("expert_3",)
    assert "always expert_3" in str(report)
    torch.testing.assert_close(report.by_router.sum(1), torch.ones(1))
    with model.use_experts("expert_3"):
        forced = model.route(input_ids=tokens())
    assert forced.top_experts() == ["expert_3"] * 2 and forced.shared_experts == ()
    with pytest.raises(ValueError, match="expected 0 … 3"):
        model(tokens(), expert_targets=torch.tensor([4, 0]))
    model(tokens(), expert_targets=torch.tensor([3, 0]), banned_experts="expert_3")


@pytest.mark.parametrize("kind", [True, False], ids=["reentrant", "non_reentrant"])
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("scope", ["site", "model"])
def test_checkpointing_has_the_gradients_of_none(scope, level, kind):
    model = shared(router_scope=scope, routing_level=level)
    expected = gradients(model, **batch())
    assert all(bool(grad.any()) for grad in expected.values())
    model.gradient_checkpointing_enable({"use_reentrant": kind})
    assert_same(gradients(model, **batch()), expected, 1e-5)


@torch.no_grad()
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("scope", ["site", "model"])
def test_generation_with_cache_beams_and_padding(scope, level):
    model = shared(router_scope=scope, routing_level=level)
    rows = [tokens(1, n, seed=n)[0] for n in (4, 7)]
    how = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    together = model.generate(**left_padded(rows), **how)
    for row, got in zip(rows, together):
        alone_ = model.generate(row[None], **how)[0]
        assert torch.equal(got[-4:], alone_[-4:])
        assert torch.equal(model.generate(row[None], use_cache=False, **how)[0], alone_)
    assert model.generate(rows[0][None], num_beams=2, **how).shape == (1, 8)


@torch.no_grad()
def test_it_saves_and_loads(tmp_path):
    model = shared(2)
    model.save_pretrained(tmp_path)
    again = MoeLoraForCausalLM.from_pretrained(str(tmp_path), base=causal_base()).eval()
    assert again.moelora_config.num_shared_experts == 2
    assert_bits(bits(again), bits(model))
    assert torch.equal(again(tokens()).logits, model(tokens()).logits)


@torch.no_grad()
def test_experts_come_before_the_shared_ones_and_go():
    model = shared(router_scope="model", expert_dropout=[0.1, 0.2, 0.2, 0.3])
    (router,) = model.moelora.router_list
    rows = router.weight.clone()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    with torch.enable_grad():
        model.train()(tokens(), labels=tokens()).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    frozen = model.freeze_experts("expert_3")
    resume_optimizer(optimizer, frozen)
    model.eval().moelora.router_list[0].weight.copy_(rows)
    resume_optimizer(optimizer, model.add_expert("law"))
    config = model.moelora_config
    assert config.expert_names == [*NAMES[:3], "law", "expert_3"]
    assert config.shared_expert_names == ["expert_3"] and model.moelora.load.current.shape[1] == 4
    assert config.expert_dropout == [0.1, 0.2, 0.2, 0.2, 0.3]
    assert all(factor.frozen_experts == {4} for factor in model.moelora.factors())
    (router,) = model.moelora.router_list
    assert torch.equal(router.weight[:3], rows)
    torch.testing.assert_close(router.weight[3], rows.mean(0))
    state = optimizer.state[router.weight]["exp_avg"]
    assert bool(state[:3].any(1).all()) and not bool(state[3].any())
    model.add_expert("copy", copy_of="expert_3")
    copied = model.moelora.expert(4)
    kept = model.moelora.expert(5)
    assert all(torch.equal(copied[n].B, kept[n].B) for n in kept)
    assert model.moelora_config.shared_expert_names == ["expert_3"]
    assert model.moelora_config.expert_dropout[4] == 0.3
    model.remove_expert("copy")
    model.remove_expert("law")
    assert model.moelora_config.expert_names == NAMES
    model.replace_expert("expert_3", copy_of="expert_3")
    model.remove_expert("expert_3")
    assert model.moelora_config.num_shared_experts == 0
    assert model.moelora.router_list[0].weight.shape[0] == 3
    model(tokens())
    with pytest.raises(ValueError, match="would have 1 experts"):
        shared(2).remove_expert("expert_0")


@torch.no_grad()
def test_replacing_a_shared_expert_leaves_the_routers():
    model = shared()
    rows = [router.weight.clone() for router in model.moelora.router_list]
    model.replace_expert("expert_3", r=5)
    assert model.moelora_config.shared_expert_names == ["expert_3"]
    for before, router in zip(rows, model.moelora.router_list):
        assert torch.equal(before, router.weight)
    # Fresh: B = 0, so the mixture is that of the routed experts.
    expected = model(tokens(), banned_experts="expert_3").logits
    torch.testing.assert_close(model(tokens()).logits, expected, **CLOSE)


@torch.no_grad()
def test_exports_and_merges_take_what_they_name(tmp_path):
    model = shared()
    with model.use_experts({"expert_1": 0.5, "expert_3": 1.0}):
        expected = model(tokens()).logits
    with model.use_experts("expert_3"):
        alone_ = model(tokens()).logits
    model.export_expert("expert_3", tmp_path / "shared")
    loaded = peft.PeftModel.from_pretrained(causal_base(), tmp_path / "shared")
    torch.testing.assert_close(loaded(tokens()).logits, alone_, **CLOSE)
    merged = model.merge_and_unload({"expert_1": 0.5, "expert_3": 1.0})
    torch.testing.assert_close(merged(tokens()).logits, expected, **CLOSE)


@torch.no_grad()
def test_an_expert_alone_has_the_shared_ones_beside_it():
    model = shared(2, num_experts_per_tok=1, null_expert=True)
    assert alone(model, "expert_0") == {"expert_2": 1.0, "expert_3": 1.0, "expert_0": 1.0}
    assert alone(model, NO_EXPERT) == {"expert_2": 1.0, "expert_3": 1.0}
    assert alone(causal(), NO_EXPERT) == {"expert_0": 0.0}
    model = shared(2, num_experts_per_tok=1, router_scope="model", routing_level="sequence")
    texts = {f"expert_{n}": list(tokens(4, 6, seed=n) % 20 + 3 + 25 * n) for n in range(2)}
    initialise(model, "prototype", texts)
    for name, rows in texts.items():
        assert model.route(input_ids=torch.stack(rows)).top_experts() == [name] * 4
    arrow = shared(2, router="arrow")
    initialise(arrow, "arrow")
    assert all(len(router.weight) == 2 for router in arrow.moelora.router_list)


def test_impossible_numbers_are_refused_with_the_remedy():
    for fields, match in (
        ({"num_experts": 4, "num_shared_experts": 4}, "leaves routers none to choose among.*raise"),
        ({"num_experts": 4, "num_shared_experts": 3}, "less num_shared_experts=3.*Lower"),
    ):
        with pytest.raises(ValueError, match=match):
            MoeLoraConfig(**fields)
