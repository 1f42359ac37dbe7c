"""Experts by layer (arXiv:2402.08562), and ranks by pattern as PEFT's."""

from __future__ import annotations

import peft
import pytest
import torch
from bases import causal_base
from core.dense import assert_plain_sum, dense_logits
from core.mixtures import LEVELS, NO_ROUTER_LOSS, activate, causal, factors, tokens
from peft.utils.other import get_pattern_key
from training.runs import assert_bits, assert_same, batch, bits, gradients

from moelora import MoeLoraConfig, MoeLoraForCausalLM
from moelora.injection.by_layer import layer_counts
from moelora.training import Texts, train_gate

CLOSE = {"rtol": 1e-4, "atol": 1e-5}
LAYERS = [f"model.layers.{i}" for i in range(2)]
SCOPES = ("projection", "site", "layer")
# The first layer has two of four experts.
FEWER = {"experts_per_layer": [2, 4]}
SETTINGS = {
    "projection": {"num_shared_experts": 0},
    "site": {"num_experts": 5, "num_shared_experts": 1},
    "layer": {"num_experts": 5, "num_shared_experts": 1, "null_expert": True},
}


def fewer(**fields):
    return causal(**{**FEWER, **fields})


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("scope", SCOPES)
def test_a_mixture_is_the_plain_sum_with_all_gradients(scope, level):
    fields = {"router_scope": scope, "routing_level": level, **SETTINGS[scope]}
    model = fewer(**NO_ROUTER_LOSS, **fields)
    assert_plain_sum(model, model(tokens()).logits)


@torch.no_grad()
@pytest.mark.parametrize("scope", SCOPES)
def test_a_layer_has_no_rows_and_no_choice_of_what_it_lacks(scope):
    model = fewer(router_scope=scope)
    assert model.moelora_config.layer_experts == {LAYERS[0]: [0, 1], LAYERS[1]: [0, 1, 2, 3]}
    for expert in range(4):
        for name, own in model.moelora.expert(expert).items():
            there = expert < 2 or name.startswith(LAYERS[1])
            assert len(own.A) == len(own.B) == (3 if there else 0)
    routings = model(tokens(), output_expert_routing=True).expert_routing
    for layer, routing in zip(model.moelora.router_layers(), routings, strict=True):
        if layer == LAYERS[0]:
            assert int(routing.expert_ids.max()) <= 1 and int(routing.expert_ids.min()) == 0
            assert bool((routing.logits[:, 2:] == -torch.inf).all())
        else:
            assert bool(routing.logits.isfinite().all())
    report = model.route(input_ids=tokens())
    assert bool(report.by_router.isfinite().all() and report.probabilities.isfinite().all())


@pytest.mark.parametrize("window", ["previous_step", "micro_batch"])
def test_the_balancing_loss_is_that_of_the_experts_that_there_are(window):
    model = fewer(router_scope="layer", router_z_loss_coef=0.0, router_aux_loss_window=window)
    load = model.moelora.load
    assert load.sizes == (2, 4)
    # Before any step the shares are equal, and the loss is 1 whatever the probabilities.
    out = model.train()(tokens(), labels=tokens(), output_expert_routing=True)
    if window == "previous_step":
        torch.testing.assert_close(out.expert_aux_loss, torch.tensor(0.01))
    load.previous.copy_(torch.tensor([[30, 10, 0, 0], [5, 10, 15, 20]]))
    out = model(tokens(), labels=tokens(), output_expert_routing=True)
    losses = []
    for routing, size, counts in zip(out.expert_routing, load.sizes, load.previous):
        if window == "micro_batch":
            counts = torch.bincount(routing.expert_ids.flatten(), minlength=4)
        probabilities = routing.logits[:, :size].softmax(-1).mean(0)
        losses.append(0.01 * size * (probabilities * counts[:size] / counts.sum()).sum())
    torch.testing.assert_close(out.expert_aux_loss, sum(losses) / 2)
    out.loss.backward()
    assert all(bool(p.grad.isfinite().all()) for p in model.moelora.routers.parameters())


def test_the_bias_balances_what_there_is():
    model = fewer(router_scope="layer", router_bias_update_rate=0.1).train()
    load = model.moelora.load
    load.current.copy_(torch.tensor([[30, 10, 0, 0], [30, 10, 10, 10]]))
    model(tokens(), labels=tokens())
    assert load.bias[0, :2].tolist() == pytest.approx([-0.1, 0.1])
    assert load.bias[1].tolist() == pytest.approx([-0.1, 0.1, 0.1, 0.1])
    out = model(tokens(), labels=tokens(), output_expert_routing=True)
    assert int(out.expert_routing[0].expert_ids.max()) <= 1


def test_targets_that_a_layer_lacks_are_learned_elsewhere():
    model = fewer(router_scope="layer", router_aux_loss_coef=0.0, router_z_loss_coef=0.0).train()
    targets = torch.tensor([3, 0])
    out = model(tokens(), labels=tokens(), expert_targets=targets, output_expert_routing=True)
    rows = targets.repeat_interleave(10)
    each = torch.nn.functional.cross_entropy
    first, second = (routing.logits for routing in out.expert_routing)
    expected = each(first[10:], rows[10:], reduction="sum") + each(second, rows, reduction="sum")
    torch.testing.assert_close(out.expert_aux_loss, expected / 20 / 2)
    out.loss.backward()
    assert all(bool(p.grad.isfinite().all()) for p in model.moelora.routers.parameters())
    texts = {f"expert_{e}": Texts([{"input_ids": tokens()[0]}]) for e in (1, 3)}
    report = train_gate(model, texts, epochs=2)
    assert all(0 < loss < 10 for loss in report.losses)
    # No text of an expert that the first layer has.
    train_gate(model, {"expert_3": texts["expert_3"]}, epochs=1)
    assert all(bool(p.isfinite().all()) for p in model.moelora.routers.parameters())


@torch.no_grad()
def test_bans_must_leave_every_layer_an_expert():
    model = fewer(num_experts_per_tok=1)
    with pytest.raises(ValueError, match=r"All experts that model.layers.0 has are banned"):
        model(tokens(), banned_experts=["expert_0", "expert_1"])
    with model.use_experts(ban=["expert_0", "expert_3"]):
        routings = model(tokens(), output_expert_routing=True).expert_routing
    assert bool((routings[0].expert_ids == 1).all())
    with model.use_experts("expert_3", ban=["expert_0", "expert_1"]):
        forced = model(tokens()).logits
    with model.use_experts("expert_3"):
        assert torch.equal(model(tokens()).logits, forced)
    null = fewer(num_experts_per_tok=1, null_expert=True)
    routings = null(
        tokens(), banned_experts=["expert_0", "expert_1"], output_expert_routing=True
    ).expert_routing
    assert bool((routings[0].expert_ids == -1).all())


@pytest.mark.parametrize("kind", [True, False], ids=["reentrant", "non_reentrant"])
def test_checkpointing_has_the_gradients_of_none(kind):
    model = fewer(router_scope="layer")
    expected = gradients(model, **batch())
    model.gradient_checkpointing_enable({"use_reentrant": kind})
    assert_same(gradients(model, **batch()), expected, 1e-5)


@torch.no_grad()
@pytest.mark.parametrize("level", LEVELS)
def test_it_generates_saves_and_loads(level, tmp_path):
    model = fewer(routing_level=level)
    how = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    out = model.generate(tokens(), **how)
    assert torch.equal(model.generate(tokens(), use_cache=False, **how), out)
    model.save_pretrained(tmp_path)
    again = MoeLoraForCausalLM.from_pretrained(str(tmp_path), base=causal_base()).eval()
    assert again.moelora_config.layer_experts == model.moelora_config.layer_experts
    assert again.moelora_config.experts_per_layer == [2, 4]
    assert_bits(bits(again), bits(model))
    assert torch.equal(again.generate(tokens(), **how), out)
    with pytest.raises(ValueError, match="experts_per_layer leaves a layer 2 experts"):
        MoeLoraForCausalLM.from_pretrained(str(tmp_path), base=causal_base(), num_experts_per_tok=3)


@torch.no_grad()
def test_experts_come_into_all_layers_and_go(tmp_path):
    model = fewer()
    model.add_expert("law")
    assert model.moelora_config.layer_experts == {LAYERS[0]: [0, 1, 4], LAYERS[1]: [0, 1, 2, 3, 4]}
    assert model.moelora_config.experts_per_layer is None
    assert all(len(own.A) == 3 for own in model.moelora.expert(4).values())
    model.add_expert("copy", copy_of="expert_3")
    assert model.moelora_config.layer_experts[LAYERS[0]] == [0, 1, 4]
    assert model.moelora.load.sizes == (3,) * 4 + (6,) * 4
    model.remove_expert("expert_0")
    assert model.moelora_config.layer_experts == {LAYERS[0]: [0, 3], LAYERS[1]: [0, 1, 2, 3, 4]}
    with pytest.raises(ValueError, match="model.layers.0 would have 1 experts"):
        model.remove_expert("law")
    model.remove_expert("expert_2")
    model.save_pretrained(tmp_path)
    again = MoeLoraForCausalLM.from_pretrained(str(tmp_path), base=causal_base()).eval()
    assert torch.equal(again(tokens()).logits, model(tokens()).logits)
    activate(model)
    torch.testing.assert_close(model(tokens()).logits, dense_logits(model, tokens()), **CLOSE)


@torch.no_grad()
def test_an_expert_of_some_layers_is_exported_as_an_adapter_of_these(tmp_path):
    model = fewer()
    with model.use_experts("expert_3"):
        expected = model(tokens()).logits
    model.export_expert("expert_3", tmp_path / "late")
    loaded = peft.PeftModel.from_pretrained(causal_base(), tmp_path / "late")
    adapted = {name for name, _ in loaded.named_modules() if name.endswith("lora_A")}
    assert len(adapted) == 7 and all("layers.1." in name for name in adapted)
    torch.testing.assert_close(loaded(tokens()).logits, expected, **CLOSE)
    new = model.add_expert("late", adapter=tmp_path / "late")
    assert new.moved and model.moelora_config.layer_experts[LAYERS[0]] == [0, 1]
    report = model.export_merged({"expert_0": 0.5, "expert_3": 0.5}, tmp_path / "merged")
    assert report.error < 1e-6
    with model.use_experts({"expert_0": 0.5, "expert_3": 0.5}):
        expected = model(tokens()).logits
    merged = model.merge_and_unload({"expert_0": 0.5, "expert_3": 0.5})
    torch.testing.assert_close(merged(tokens()).logits, expected, **CLOSE)


def test_lists_and_rules_are_stretched_over_the_layers():
    def counts(per_layer, layers, **fields):
        fields = {"num_experts": 8, "num_experts_per_tok": 1, **fields}
        return layer_counts(MoeLoraConfig(experts_per_layer=per_layer, **fields), layers)

    assert counts([2, 4, 6, 8], 8) == [2, 2, 4, 4, 6, 6, 8, 8]
    assert counts([2, 8], 5) == [2, 2, 2, 8, 8]
    assert counts("increasing", 4) == [2, 4, 6, 8]
    assert counts("decreasing", 4) == [8, 6, 4, 2]
    assert counts("hourglass", 4) == [8, 2, 2, 8]
    assert counts("increasing", 4, num_experts_per_tok=3) == [3, 4, 6, 8]
    assert counts("increasing", 4, num_shared_experts=4) == [1, 2, 3, 4]
    assert counts(None, 3) == [8, 8, 8]
    with pytest.raises(ValueError, match="gives 4 groups .* has 3 decoder layers"):
        counts("increasing", 3)


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"experts_per_layer": [2, 3]}, "no layer with all 4 experts"),
        ({"experts_per_layer": [1, 4]}, "a layer 1 experts.*num_experts_per_tok=2"),
        ({"experts_per_layer": [2, 5]}, "experts_per_layer=5 is too large"),
        ({"experts_per_layer": [0, 4]}, "experts_per_layer=0 is too small"),
        ({"experts_per_layer": "rising"}, "increasing, decreasing, hourglass"),
        ({"experts_per_layer": [2, 4], "router_scope": "model"}, "use router_scope='layer'"),
        ({"experts_per_layer": "increasing", "router_scope": "model"}, "router_scope='layer'"),
        ({"layer_experts": {"a": [0]}}, "layer_experts.*a layer 1 experts"),
        ({"layer_experts": {"a": [1, 0]}}, "different ones that rise"),
        ({"layer_experts": {"a": [0, 4]}}, "too large"),
        ({"layer_experts": {"a": [0, 1]}, "router_scope": "model"}, "router_scope='layer'"),
        ({"rank_pattern": {"q": 0}}, "rank_pattern.*too small"),
        ({"rank_pattern": {"q": [1, 2]}}, "lists 2 values for num_experts=4"),
        ({"rank_pattern": {"(": 2}}, "not a valid regular expression"),
        ({"rank_pattern": {"(a+)+b": 2}}, "too many ways"),
        ({"alpha_pattern": {"q": -1.0}}, "alpha_pattern.*out of range"),
    ],
    ids=str,
)
def test_impossible_layers_and_patterns_are_refused(fields, match):
    with pytest.raises(ValueError, match=match):
        MoeLoraConfig(**{"num_experts": 4, **fields})


@pytest.mark.parametrize(
    "fields",
    [
        *({"experts_per_layer": wrong} for wrong in (4, [], [2.0, 4], {"a": 2})),
        *({"layer_experts": wrong} for wrong in ([2], {"a": 2}, {"a": ["0"]})),
        *({"rank_pattern": wrong} for wrong in (4, ["q"], {"q": 2.5}, {3: 2})),
        {"alpha_pattern": {"q": "8"}},
    ],
    ids=str,
)
def test_layers_and_patterns_of_a_wrong_type_are_refused(fields):
    with pytest.raises(TypeError, match=f"{next(iter(fields))}.*expected"):
        MoeLoraConfig(**{"num_experts": 4, "num_experts_per_tok": 1, **fields})


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"experts_per_layer": [2, 3, 4]}, "has 2 decoder layers"),
        ({"experts_per_layer": [2, 4], "layers_to_transform": 0}, "'expert_2' would be in no"),
        ({"layer_experts": {"model.layers.7": [0, 1]}}, "not an adapted decoder layer"),
        ({"layer_experts": {layer: [0, 1] for layer in LAYERS}}, "'expert_2' would be in no"),
        ({"rank_pattern": {"no_proj": 4}}, "'no_proj', which matches no adapted linear"),
        ({"rank_pattern": {".*": 4, "q_proj": 2}}, "'q_proj'.*an earlier"),
        (
            {
                "rank_pattern": {"q_proj": 2},
                "expert_ranks": {f"{LAYERS[0]}.self_attn.q_proj": [5] * 4},
            },
            "leave it out of one",
        ),
    ],
    ids=str,
)
def test_what_does_not_fit_the_base_is_refused(fields, match):
    base = causal_base()
    with pytest.raises(ValueError, match=match):
        MoeLoraForCausalLM.from_base(base, MoeLoraConfig(num_experts=4, **fields))
    assert type(base).__name__ == "LlamaForCausalLM"


PATTERNS = {
    "rank_pattern": {"layers.1.self_attn.q_proj": 5, r".*\.0\.mlp\.(up|down)_proj": 2, "o_proj": 1},
    "alpha_pattern": {"up_proj": 7, "model.layers.0.self_attn.q_proj": 1.5},
}


@pytest.mark.parametrize("use_rslora", [False, True])
def test_patterns_give_the_ranks_and_scalings_of_peft(use_rslora):
    fields = {"r": 3, "lora_alpha": 6, "use_rslora": use_rslora, **PATTERNS}
    model = causal(num_experts=1, num_experts_per_tok=1, **fields)
    targets = [name.rpartition(".")[2] for name in model.moelora.linears()]
    lora = peft.LoraConfig(target_modules=sorted(set(targets)), **fields)
    for name, module in peft.get_peft_model(causal_base(), lora).named_modules():
        linear = name.removeprefix("base_model.model.")
        if linear in model.moelora.linears():
            own = model.moelora.expert(0)[linear]
            assert len(own.A) == module.r["default"]
            assert own.scaling == module.scaling["default"]


def test_patterns_may_say_more_of_single_experts_and_all_rows_train(tmp_path):
    patterns = {"rank_pattern": {"q_proj": [1, 2, 3, 4]}, "alpha_pattern": {"q_proj": 4}}
    model = causal(**patterns, **FEWER)
    for name in model.moelora.linears():
        ranks = [len(own[0]) for own in (factors(model, e)[name] for e in range(4))]
        usual = [1, 2, 3, 4] if name.endswith("q_proj") else [3] * 4
        assert ranks == ([*usual[:2], 0, 0] if LAYERS[0] in name else usual)
        if name.endswith("q_proj"):
            assert model.moelora_config.scaling_of(name) == (4, 2, 4 / 3, 1)
    gradients_ = gradients(model, **batch())
    assert all(bool(grad.any()) for grad in gradients_.values())
    model.eval().save_pretrained(tmp_path)
    again = MoeLoraForCausalLM.from_pretrained(str(tmp_path), base=causal_base()).eval()
    assert torch.equal(again(tokens()).logits, model(tokens()).logits)
    other = MoeLoraForCausalLM.from_pretrained(str(tmp_path), base=causal_base(), lora_alpha=60)
    linear = f"{LAYERS[1]}.self_attn.q_proj"
    assert other.moelora_config.scaling_of(linear) == (4, 2, 4 / 3, 1)
    assert get_pattern_key(list(patterns["rank_pattern"]), linear) == "q_proj"


@torch.no_grad()
def test_a_new_expert_takes_the_rank_that_all_have_in_a_linear(tmp_path):
    model = causal(rank_pattern={"q_proj": 5})
    model.add_expert("law")
    model.add_expert("long", r=7, lora_alpha=7)
    linear = f"{LAYERS[1]}.self_attn.q_proj"
    assert model.moelora_config.ranks_of(linear) == (5, 5, 5, 5, 5, 7)
    assert model.moelora_config.scaling_of(linear)[3:] == (6 / 5, 6 / 5, 1)
    assert model.moelora_config.rank_pattern is None
    model.save_pretrained(tmp_path)
    again = MoeLoraForCausalLM.from_pretrained(str(tmp_path), base=causal_base()).eval()
    assert torch.equal(again(tokens()).logits, model(tokens()).logits)
    other = MoeLoraForCausalLM.from_base(causal_base(), model.moelora_config)
    assert other.moelora_config.expert_ranks == model.moelora_config.expert_ranks


def test_adapters_bring_ranks_and_layers_of_their_own(tmp_path):
    model = causal()
    model.export_expert("expert_0", tmp_path / "a")
    for fields in ({"rank_pattern": {"q_proj": 4}}, {"experts_per_layer": [2, 4]}):
        config = MoeLoraConfig(num_experts=4, **fields)
        sources = dict.fromkeys("abcd", tmp_path / "a")
        with pytest.raises(ValueError, match=f"config.{next(iter(fields))}.*leave it out"):
            MoeLoraForCausalLM.from_adapters(causal_base(), sources, config)
    config = MoeLoraConfig(num_experts=2, num_shared_experts=1, num_experts_per_tok=1)
    sources = dict.fromkeys("ab", tmp_path / "a")
    made = MoeLoraForCausalLM.from_adapters(causal_base(), sources, config)
    assert made.moelora_config.shared_expert_names == ["b"]
