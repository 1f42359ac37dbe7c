"""Gradient accumulation and the window of the balancing loss: cuts change nothing."""

from __future__ import annotations

import copy

import pytest
import torch
from bases import causal_base
from core.mixtures import LEVELS, causal, classifier, into
from training.runs import (
    LOSSES,
    NO_LOSSES,
    assert_same,
    batch,
    classes,
    difference,
    gradients_of,
    only_routers,
    open_window,
    random_batches,
    rows_of,
    step,
    train,
    without_losses,
)

CUTS = {1: 8, 4: 2, 2: 4}


def _accumulated(model, data, folder, cut, **settings):
    """What one or more optimizer steps on 8 rows recorded, cut into `cut` micro-batches of 8 /
    `cut` rows.
    """
    model = copy.deepcopy(model)
    open_window(model)
    rows = {"per_device_train_batch_size": CUTS[cut], "gradient_accumulation_steps": cut}
    return train(model, data, folder, **{"max_steps": 1, **rows, **settings})


@pytest.mark.parametrize("level", LEVELS)
def test_accumulation_has_the_gradients_of_the_whole_batch(level, tmp_path):
    model, data = causal(routing_level=level, **LOSSES).double(), rows_of(batch(8))
    whole, *cut_up = (_accumulated(model, data, tmp_path, cut).gradients[0] for cut in CUTS)
    for found in cut_up:
        assert_same(found, whole)
    lossless = _accumulated(without_losses(model), data, tmp_path, 1).gradients[0]
    assert difference(lossless, whole) > 0.05


def test_accumulation_counts_and_gradients_agree_in_later_steps_too(tmp_path):
    """From the second step on the fractions are the ones of the run itself."""
    model, data = causal(**LOSSES).double(), rows_of(batch(8))
    # Plain descent, since Adam's first steps divide rounding by rounding.
    runs = [_accumulated(model, data, tmp_path, c, max_steps=3, optim="sgd") for c in CUTS]
    for run in runs[1:]:
        for found, expected in zip(run.gradients, runs[0].gradients):
            assert_same(found, expected, tolerance=1e-4)  # three steps, each on what the last left
        for name in ("current", "previous"):
            assert all(
                torch.equal(a, b) for a, b in zip(getattr(run, name), getattr(runs[0], name))
            )


def test_the_micro_batch_window_depends_on_how_the_batch_is_cut(tmp_path):
    model = causal(router_aux_loss_window="micro_batch", **LOSSES).double()
    data = rows_of(batch(8))
    whole, *cut_up = (_accumulated(model, data, tmp_path, cut).gradients[0] for cut in CUTS)
    assert all(difference(found, whole) > 0.02 for found in cut_up)


def test_a_classifiers_router_losses_are_additive(tmp_path):
    """With minus without losses: transformers leaves a classifier's own loss unscaled under
    accumulation.
    """
    model, data = classifier("llama", **LOSSES).double(), rows_of(classes(8))
    own = []
    for cut in CUTS:
        both = [
            _accumulated(m, data, tmp_path, cut).gradients[0]
            for m in (model, without_losses(model))
        ]
        own.append({name: both[0][name] - both[1][name] for name in only_routers(both[0])})
    assert_same(own[1], own[0])
    assert_same(own[2], own[0])


def test_the_first_step_has_equal_fractions():
    model = causal(**LOSSES)
    load = model.moelora.load
    model.train()(**batch()).loss.backward()
    assert int(load.previous.sum()) == 0
    assert torch.equal(load.fractions(0), torch.full((4,), 0.25))


def test_counts_are_the_choices_of_all_tokens_but_padding():
    model, inputs = causal(**LOSSES), batch()
    routings = model.train()(**inputs, output_expert_routing=True).expert_routing
    present = inputs["attention_mask"].reshape(-1).bool()
    for found, routing in zip(model.moelora.load.current, routings):
        expected = torch.bincount(routing.expert_ids[present].reshape(-1), minlength=4)
        assert torch.equal(found, expected)


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.01),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01),
    "fused": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
}


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_the_window_rolls_once_a_step_however_the_loop_clears_gradients(kind, set_to_none):
    model = causal(**LOSSES).train()
    optimizer = OPTIMIZERS[kind](model.parameters())
    load, inputs = model.moelora.load, batch()
    choices = 2 * int(inputs["attention_mask"].sum())
    for _ in range(3):
        optimizer.zero_grad(set_to_none=set_to_none)
        before = load.current.clone()
        for micro_batches in (1, 2):
            model(**inputs).loss.backward()
            assert (load.current.sum(1) == micro_batches * choices).all()
            assert torch.equal(load.previous, before)
            with torch.no_grad():
                model(**inputs)
            model.eval()(**inputs, output_expert_routing=True)
            model.train()
            assert (load.current.sum(1) == micro_batches * choices).all()
        optimizer.step()
    assert (load.previous.sum(1) == 2 * choices).all()


def test_evaluation_between_steps_does_not_roll_the_window(tmp_path):
    recorded = []
    for settings in ({}, {"eval_strategy": "steps", "eval_steps": 1}):
        data = rows_of(batch(8))
        recorded.append(
            train(causal(**LOSSES), data, tmp_path, max_steps=3, eval_dataset=data, **settings)
        )
    for name in ("current", "previous"):
        pairs = zip(getattr(recorded[0], name), getattr(recorded[1], name))
        assert all(torch.equal(a, b) for a, b in pairs)


def _trained(**fields):
    """Routers that preferred expert 0 nearly everywhere, trained on random tokens."""
    model = into(
        causal_base(num_hidden_layers=1), num_experts_per_tok=1, **{**NO_LOSSES, **fields}
    ).train()
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        layer = model.model.layers[0]
        # A direction that all tokens share: without it a linear router cannot prefer one expert.
        model.model.embed_tokens.weight.add_(0.02)
        for norm in (layer.input_layernorm, layer.post_attention_layernorm):
            norm.weight.mul_(0.5 + torch.rand(32, generator=generator))
        for router in model.moelora.routers.values():
            router.weight[0] += 0.15
    optimizer = torch.optim.AdamW(model.moelora.routers.parameters(), lr=3e-3)
    for inputs in random_batches(40):
        step(model, optimizer, **inputs)
    return model


def _peak_load(model):
    """The largest expert's share on fresh tokens, mean over routers."""
    inputs = next(random_batches(1, rows=8, seed=12))
    return float(model.eval().route(input_ids=inputs["input_ids"]).by_router.max(1).values.mean())


def _size(model):
    """How far the logits are from costing nothing."""
    routing = model.eval()(**batch(), output_expert_routing=True).expert_routing
    return float(torch.stack([r.logits.logsumexp(-1).abs().mean() for r in routing]).mean())


@pytest.fixture(scope="module")
def unbalanced():
    """The router losses off: what the others must do better than."""
    return _trained()


def test_the_balancing_loss_evens_the_load(unbalanced):
    assert _peak_load(unbalanced) > 0.45
    assert _peak_load(_trained(router_aux_loss_coef=1.0)) < _peak_load(unbalanced) - 0.1


def test_the_selection_bias_evens_the_load_and_moves_against_it(unbalanced):
    model = _trained(router_bias_update_rate=0.02)
    assert _peak_load(model) < _peak_load(unbalanced) - 0.1
    load = model.train().moelora.load
    before = load.bias.clone()
    model.zero_grad()
    model(**batch())
    mean = load.previous.double().mean(1, keepdim=True)
    assert (load.bias > before)[load.previous < mean].all()
    assert (load.bias < before)[load.previous > mean].all()


def test_the_z_loss_shrinks_the_logits(unbalanced):
    assert _size(_trained(router_z_loss_coef=1.0)) < 0.5 * _size(unbalanced)


def test_the_selection_bias_changes_the_choice_and_not_the_weights():
    model = causal(router_bias_update_rate=0.1)
    model.moelora.load.bias[:, 3] = 10.0
    routing = model(**batch(), output_expert_routing=True).expert_routing[0]
    assert (routing.expert_ids == 3).any(1).all()
    chosen = routing.logits.softmax(-1).gather(1, routing.expert_ids)
    torch.testing.assert_close(routing.expert_weights, chosen / chosen.sum(1, keepdim=True))


@pytest.mark.parametrize("level", LEVELS)
def test_expert_targets_teach_the_router(level):
    """Sequences of low tokens belong to expert 3, of high tokens to expert 1."""
    model = into(causal_base(num_hidden_layers=1), routing_level=level, **NO_LOSSES).train()
    optimizer = torch.optim.AdamW(model.moelora.routers.parameters(), lr=0.02)
    generator = torch.Generator().manual_seed(6)
    for _ in range(50):
        ids = torch.randint(3, 10, (4, 8), generator=generator)
        ids[2:] += 40
        labels = ids.masked_fill(torch.arange(8) < 4, -100)
        step(
            model,
            optimizer,
            input_ids=ids,
            labels=labels,
            expert_targets=torch.tensor([3, 3, 1, 1]),
        )
    report = model.eval().route(input_ids=ids)
    assert report.top_experts() == ["expert_3", "expert_3", "expert_1", "expert_1"]
    assert float(report.by_sequence[0, 3]) > 0.45  # of two experts a token


def test_frozen_routers_count_and_cost_nothing():
    model = causal(**LOSSES).train()
    model.moelora.routers.requires_grad_(False)
    outputs = model(**batch())
    outputs.loss.backward()
    assert "expert_aux_loss" not in outputs
    assert int(model.moelora.load.current.sum()) == 0
    assert all(g.abs().max() > 0 for g in gradients_of(model).values())
