"""Searching a mixture's weights: a planted optimum is found, within the budget."""

from __future__ import annotations

import math
import sys

import pytest
import torch
from core.mixtures import causal, classifier, tokens

from moelora.recipes.lorahub import search_weights

INPUT = tokens(4, 12)
PLANTED = {"expert_0": 0.8, "expert_2": -0.5, "expert_3": 0.3}


def planted_loss(model):
    """The distance of the model's logits to those of `PLANTED`: 0 there alone."""
    with model.use_experts(PLANTED), torch.no_grad():
        wanted = model(INPUT).logits

    def loss():
        with torch.no_grad():
            return (model(INPUT).logits - wanted).square().sum()

    return loss


def test_a_planted_optimum_is_found_and_the_same_seed_finds_the_same():
    model = causal("llama")
    loss = planted_loss(model)
    weights, history = search_weights(model, list(PLANTED), loss, budget=240, seed=1)
    assert list(weights) == list(PLANTED)
    assert all(abs(weights[name] - value) < 0.02 for name, value in PLANTED.items())
    assert len(history) <= 240 and min(value for _, value in history) < 1e-3 * history[0][1]
    assert (weights, history) == search_weights(model, list(PLANTED), loss, budget=240, seed=1)


def test_nothing_stays_forced_or_merged():
    model = causal("llama")
    before = model.state_dict()
    free = model(INPUT).logits
    search_weights(model, ["expert_0", "expert_1"], planted_loss(model), budget=12)
    assert torch.equal(model(INPUT).logits, free)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("kind", [causal, classifier])
def test_batches_are_scored_by_the_mean_over_all_labels(kind):
    model = kind("llama" if kind is causal else "bert").train()
    batches = []
    for i, length in enumerate((5, 9)):
        ids = tokens(1 + i, length, seed=i)
        labels = ids.clone() if kind is causal else torch.arange(1 + i) % 3
        if kind is causal:
            labels[:, : 2 + i] = -100
        batches.append({"input_ids": ids, "labels": labels})
    _, history = search_weights(model, ["expert_1"], batches, budget=3)
    assert model.training and len(history) == 3
    model.eval()
    for weights, found in history:
        losses = []
        for batch in batches:
            with model.use_experts(weights), torch.no_grad():
                logits, labels = model(input_ids=batch["input_ids"]).logits, batch["labels"]
            if kind is causal:
                logits, labels = logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
            losses.append(
                torch.nn.functional.cross_entropy(logits, labels, reduction="none")[labels != -100]
            )
        assert found == pytest.approx(torch.cat(losses).mean().item(), rel=1e-5)


@pytest.mark.parametrize("budget", [1, 2, 7, 50])
def test_the_budget_the_bounds_and_the_first_guess_hold(budget):
    model = causal("llama")
    best, history = search_weights(
        model, ["expert_0", "expert_1"], planted_loss(model), budget=budget, bounds=(0.0, 0.4)
    )
    assert len(history) <= budget and history[0][0] == {"expert_0": 0.4, "expert_1": 0.4}
    assert all(0.0 <= weight <= 0.4 for weights, _ in history for weight in weights.values())
    assert best == min(history, key=lambda tried: tried[1])[0]


def test_a_loss_that_overflows_here_and_there_is_passed_by():
    model = causal("llama")
    calls = []

    def loss():
        calls.append(1)
        return math.nan if len(calls) % 2 else float(len(calls))

    best, history = search_weights(model, ["expert_0"], loss, budget=20)
    assert best == history[1][0] and history[1][1] == 2.0
    with pytest.raises(ValueError, match="NaN or Inf at all"):
        search_weights(model, ["expert_0"], lambda: math.inf, budget=20)


def test_bad_input_is_refused(monkeypatch):
    model, loss = causal("llama"), lambda: 0.0
    for names, more, message in (
        ([], {}, "at least one expert"),
        ("expert_0", {}, "expected a list"),
        (["law"], {}, "no expert 'law'.*expert_0"),
        (["expert_0", "expert_0"], {}, "twice"),
        (["expert_0"], {"budget": 0}, "budget=0"),
        (["expert_0"], {"bounds": (1.0, 1.0)}, "low end below"),
        (["expert_0"], {"bounds": 1.0}, "expected a pair"),
        (["expert_0"], {"bounds": (0.0, math.inf)}, r"bounds\[1\]=inf"),
        (["expert_0"], {"loss": iter([])}, "read again"),
        (["expert_0"], {"loss": [{"input_ids": INPUT}]}, "no labels"),
        (["expert_0"], {"loss": []}, "no label other"),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            search_weights(model, names, **{"loss": loss, **more})
    monkeypatch.setitem(sys.modules, "scipy", None)
    with pytest.raises(ImportError, match=r"moelora\[search\]"):
        search_weights(model, ["expert_0"], loss)
