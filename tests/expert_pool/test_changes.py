"""Experts that come and go in a trained mixture: the others keep their bits, and the optimizer goes
on.
"""

from __future__ import annotations

import pytest
import torch
from adapters.peft_folders import peft_model, save_adapter
from bases import causal_base
from core.mixtures import LEVELS, SCOPES, causal, into, tokens
from training.runs import assert_bits, bits, open_window

from moelora import MoeLoraForCausalLM

NAMES = [f"expert_{e}" for e in range(4)]
MIXED = {"r": [2, 3, 4, 5], "lora_alpha": [2.0, 3.0, 8.0, 5.0]}
LINEAR = "model.layers.0.self_attn.q_proj"
BY_LINEAR = {
    **MIXED,
    "expert_ranks": {LINEAR: [0, 3, 1, 2]},
    "expert_scaling": {LINEAR: [1.0, 0.5, 2.0, -1.0]},
}


def _experts(model):
    """Each expert by name: its factors, scaling and frozen state by linear, its router rows, its
    load.
    """
    found = {}
    for e, name in enumerate(model.moelora_config.expert_names):
        linears = {
            name: (own.A.clone(), own.B.clone(), own.scaling)
            for name, own in model.moelora.expert(e).items()
        }
        rows = [router.weight[e].detach().clone() for router in model.moelora.routers.values()]
        load = [
            getattr(model.moelora.load, b)[:, e].clone() for b in ("current", "previous", "bias")
        ]
        frozen = {e in factor.frozen_experts for factor in model.moelora.factors()}
        found[name] = (linears, rows, load, frozen)
    return found


def _assert_kept(before, after, names):
    for name in names:
        a, rows_a, load_a, frozen_a = before[name]
        b, rows_b, load_b, frozen_b = after[name]
        assert frozen_a == frozen_b and a.keys() == b.keys()
        for linear in a:
            assert all(torch.equal(x, y) for x, y in zip(a[linear][:2], b[linear][:2]))
            assert a[linear][2] == b[linear][2]
        assert all(torch.equal(x, y) for x, y in zip(rows_a + load_a, rows_b + load_b, strict=True))


def _assert_restored(model, folder):
    model.eval().save_pretrained(folder)
    again = MoeLoraForCausalLM.from_pretrained(str(folder), base=causal_base())
    assert_bits(bits(again), bits(model))
    assert again.moelora_config.expert_names == model.moelora_config.expert_names
    assert torch.equal(again(tokens()).logits, model(tokens()).logits)


def _trained(**fields):
    """A mixture with a load behind it, one expert of it frozen."""
    model = causal(**fields)
    model.moelora.load.bias.copy_(torch.randn_like(model.moelora.load.bias))
    open_window(model)
    model.freeze_experts("expert_2")
    return model


CHANGES = {
    "fresh": lambda m: m.add_expert("law", seed=1),
    "fresh, its own rank": lambda m: m.add_expert("law", r=7, lora_alpha=3),
    "a copy": lambda m: m.add_expert("law", copy_of="expert_1", noise=0.1, seed=1),
    "a removal": lambda m: m.remove_expert("expert_1"),
    "a fresh replacement": lambda m: m.replace_expert("expert_1", r=6),
    "a copy as replacement": lambda m: m.replace_expert("expert_1", copy_of="expert_3"),
}


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("fields", [{}, BY_LINEAR], ids=["alike", "mixed ranks"])
@pytest.mark.parametrize("change", CHANGES)
def test_the_others_keep_their_bits_and_a_checkpoint_has_it_all(
    change, fields, scope, level, tmp_path
):
    model = _trained(router_scope=scope, routing_level=level, **fields)
    before = _experts(model)
    CHANGES[change](model)
    after = _experts(model)
    others = ["expert_0", "expert_2", "expert_3"] + (["expert_1"] if "law" in after else [])
    assert set(after) - {"law", "expert_1"} == set(others) - {"expert_1"}
    assert model.moelora_config.num_experts == len(after) == model.moelora.num_experts
    _assert_kept(before, after, others)
    for name in others[1:3]:
        # The same expert alone gives the logits that it gave.
        twin = causal(router_scope=scope, routing_level=level, **fields)
        with model.use_experts(name), twin.use_experts(name), torch.no_grad():
            torch.testing.assert_close(model(tokens()).logits, twin(tokens()).logits)
    _assert_restored(model, tmp_path)


def test_a_fresh_expert_adds_nothing_and_has_the_mean_router_row():
    model = _trained(**MIXED)
    before = _experts(model)
    model.add_expert("law", r=7, lora_alpha=3, seed=1)
    linears, rows, load, frozen = _experts(model)["law"]
    assert frozen == {False} and not any(counts.any() for counts in load)
    for i, row in enumerate(rows):
        torch.testing.assert_close(row, torch.stack([before[n][1][i] for n in NAMES]).mean(0))
    for A, B, scaling in linears.values():
        assert A.shape[0] == 7 and scaling == 3 / 7 and A.any() and not B.any()
        assert A.abs().max() <= A.shape[1] ** -0.5
    with model.use_experts("law"):
        assert torch.equal(model(tokens()).logits, causal_base()(tokens()).logits)
    twin = _trained(**MIXED)
    twin.add_expert("law", r=7, lora_alpha=3, seed=1)
    assert_bits(bits(twin), bits(model))
    assert model.moelora_config.r == [2, 3, 4, 5, 7] and model.moelora_config.lora_alpha == [
        2.0,
        3.0,
        8.0,
        5.0,
        3,
    ]
    single = causal()
    single.add_expert("law")
    assert single.moelora_config.r == 3 and single.moelora_config.expert_ranks is None


def test_a_copy_is_its_original_and_noise_is_relative_to_it():
    model = _trained(**BY_LINEAR)
    model.add_expert("twin", copy_of="expert_2")
    model.add_expert("noisy", copy_of="expert_2", noise=0.1, seed=1)
    experts = _experts(model)
    for linear, (A, B, scaling) in experts["expert_2"][0].items():
        assert torch.equal(experts["twin"][0][linear][0], A) and torch.equal(
            experts["twin"][0][linear][1], B
        )
        assert experts["twin"][0][linear][2] == experts["noisy"][0][linear][2] == scaling
        for own, noisy in zip((A, B), experts["noisy"][0][linear]):
            assert 0.05 < float((noisy - own).std() / own.std()) < 0.2
    for name in ("twin", "noisy"):
        assert all(torch.equal(a, b) for a, b in zip(experts[name][1], experts["expert_2"][1]))
        assert experts[name][3] == {False}, "it trains, though its original is frozen"


def test_an_expert_from_a_peft_adapter_gives_peft_s_logits(tmp_path):
    fields = {
        "r": 6,
        "lora_alpha": 9,
        "rank_pattern": {"q_proj": 2},
        "target_modules": ["q_proj", "down_proj"],
    }
    folder = save_adapter(tmp_path / "law", "llama", **fields)
    expected = peft_model("llama", **fields)(tokens()).logits
    for change in ("add", "replace"):
        model = _trained(**BY_LINEAR)
        before = _experts(model)
        name = "law" if change == "add" else "expert_1"
        (model.add_expert if change == "add" else model.replace_expert)(name, adapter=folder)
        _assert_kept(before, _experts(model), [n for n in NAMES if n != name])
        with model.use_experts(name):
            torch.testing.assert_close(model(tokens()).logits, expected, rtol=1e-5, atol=1e-5)
        _assert_restored(model, tmp_path / change)
    small = into(causal_base(), target_modules=["q_proj"])
    with pytest.raises(ValueError, match=r"down_proj.*from_adapters"):
        small.add_expert("law", adapter=folder)


def _copied(model):
    return bits(model), model.moelora_config.own_fields()


REFUSED = {
    "expert_1'? already": lambda m: m.add_expert("expert_1"),
    "EXPERT_1'? already": lambda m: m.add_expert("EXPERT_1"),
    "fit for a folder": lambda m: m.add_expert("a/b"),
    "Fit for a folder|fit for a folder": lambda m: m.add_expert(".hidden"),
    "1 to": lambda m: m.add_expert(""),
    "exclude each other": lambda m: m.add_expert("law", adapter="x", copy_of="expert_1"),
    "name its original": lambda m: m.add_expert("law", noise=0.1),
    "noise=-1": lambda m: m.add_expert("law", copy_of="expert_1", noise=-1.0),
    "brings its own": lambda m: m.add_expert("law", copy_of="expert_1", r=4),
    "r=0": lambda m: m.add_expert("law", r=0),
    "no expert 'maths'": lambda m: m.add_expert("law", copy_of="maths"),
    "no expert 'maths'.": lambda m: m.remove_expert("maths"),
    "no expert 'maths'. ": lambda m: m.replace_expert("maths"),
    "reached|no such|nowhere": lambda m: m.add_expert("law", adapter="./nowhere"),
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_cannot_be_is_refused_and_nothing_changes(message):
    model = _trained(**BY_LINEAR)
    parameters = dict(model.named_parameters())
    state, config = _copied(model)
    with pytest.raises(ValueError, match=message.strip()):
        REFUSED[message](model)
    assert_bits(bits(model), state)
    assert model.moelora_config.own_fields() == config
    assert all(p is parameters[n] for n, p in model.named_parameters())


def test_no_fewer_experts_remain_than_a_token_chooses_and_none_change_while_forced():
    model = causal(num_experts=3, r=3)
    model.remove_expert("expert_0")
    assert model.moelora_config.expert_names == ["expert_1", "expert_2"]
    with pytest.raises(ValueError, match="num_experts_per_tok=2"):
        model.remove_expert("expert_1")
    with model.use_experts("expert_1"), pytest.raises(ValueError, match="leave it first"):
        model.add_expert("law")
    alone = causal(num_experts=1, num_experts_per_tok=1)
    with pytest.raises(ValueError, match="cannot be removed"):
        alone.remove_expert("expert_0")
    alone.replace_expert("expert_0", seed=1)
    assert torch.equal(alone(tokens()).logits, causal_base()(tokens()).logits)


def test_a_linear_that_loses_its_only_expert_is_the_base_s():
    model = causal(**{**MIXED, "expert_ranks": {LINEAR: [0, 3, 0, 0]}})
    model.remove_expert("expert_1")
    assert not any(model.moelora.expert(e)[LINEAR].B.numel() for e in range(3))
    model.train()(tokens(), labels=tokens()).loss.backward()
    model.add_expert("law", copy_of="expert_2")
    assert bool(model(tokens()).logits.isfinite().all())


@pytest.mark.parametrize("names", [None, 5, 1.5])
@pytest.mark.parametrize("how", ["freeze_experts", "unfreeze_experts"])
def test_freezing_what_is_not_a_name_says_what_was_expected(how, names):
    model = causal()
    with pytest.raises(TypeError, match=f"names={names}.*expected an expert's name.*expert_0"):
        getattr(model, how)(names)
    with pytest.raises(ValueError, match="no expert 5.*expert_0"):
        getattr(model, how)([5])
    with pytest.raises(ValueError, match="seed=.* is too large"):
        model.add_expert("law", seed=2**64)
