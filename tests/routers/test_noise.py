"""Routers that draw: what they draw, that evaluation draws nothing, and that a layer which is
computed again draws the same.
"""

from __future__ import annotations

import pytest
import torch
from core.mixtures import LEVELS, causal, prompt_mask, rows_for, tokens
from training.runs import LOSSES, assert_same, batch, gradients

from moelora import ROUTERS, MoeLoraConfig

D, MANY = 6, 4000


def router_of(name: str, **fields):
    return ROUTERS[name](MoeLoraConfig(num_experts=5, router=name, **fields), D)


@pytest.mark.parametrize("kind", ["reentrant", "not"])
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("scope", ["site", "layer"])
@pytest.mark.parametrize("router", ["noisy_top_k", "random"])
def test_a_layer_that_is_computed_again_draws_the_same(router, scope, level, kind):
    fields = {"router": router, "router_scope": scope, "routing_level": level}
    model = causal(**fields, **LOSSES)
    for parameter in model.moelora.routers.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    expected = gradients(model, **batch())
    model.gradient_checkpointing_enable({"use_reentrant": kind == "reentrant"})
    assert_same(gradients(model, **batch()), expected, 1e-5)


@pytest.mark.parametrize("router", ["noisy_top_k", "random"])
def test_evaluation_draws_nothing(router):
    model = causal(router=router)
    ids = tokens()
    state = torch.random.get_rng_state()
    labels = ids.masked_fill(prompt_mask(ids, 4), -100)
    first = model(ids, labels=labels)
    assert torch.equal(model(ids, labels=labels).logits, first.logits)
    out = model.generate(ids, max_new_tokens=3, do_sample=False)
    assert torch.equal(out, model.generate(ids, max_new_tokens=3, use_cache=False))
    assert torch.equal(torch.random.get_rng_state(), state)


@torch.no_grad()
def test_in_evaluation_the_noisy_router_is_top_k():
    noisy = router_of("noisy_top_k").eval()
    torch.nn.init.normal_(noisy.noise_weight)
    plain = router_of("top_k")
    plain.weight.copy_(noisy.weight)
    x = torch.randn(9, D)
    for one, two in zip(noisy(x), plain(x)):
        assert torch.equal(one, two)


@torch.no_grad()
def test_the_noise_begins_with_the_deviation_log_2_and_is_learned():
    router = router_of("noisy_top_k").train()
    x = torch.randn(1, D).expand(MANY, D)
    noise = router(x).logits - router.score(x)
    assert float(noise.mean().abs()) < 0.03
    torch.testing.assert_close(noise.std(0), torch.full((5,), 2.0).log(), rtol=0.05, atol=0)
    router.noise_weight[1] = 50 * x[0]
    router.noise_weight[2] = -50 * x[0]
    noise = router(x).logits - router.score(x)
    assert float(noise[:, 1].std()) > 10 and not noise[:, 2].any()


@torch.no_grad()
@pytest.mark.parametrize("per_tok", [1, 3])
@pytest.mark.parametrize("null_expert", [False, True])
def test_the_control_draws_uniformly_and_evaluates_the_expectation(per_tok, null_expert):
    fields = {"num_experts_per_tok": per_tok, "null_expert": null_expert}
    router = router_of("random", **fields).train()
    x = torch.randn(MANY, D)
    for banned in (None, torch.tensor([False, True, False, False, False])):
        router.train()
        routing = router(x, banned=banned)
        if banned is None and not null_expert:
            assert all(len(set(row)) == per_tok for row in routing.expert_ids.tolist())
            assert bool((routing.expert_weights == 1 / per_tok).all())
        ids = routing.expert_ids.clamp(min=0)
        mean = torch.zeros(MANY, 5).scatter_add(1, ids, routing.expert_weights).mean(0)
        expected = router.eval()(x, banned=banned).expert_weights[0, :5]
        allowed = 5 + null_expert - (banned is not None)
        assert float(expected.max()) == pytest.approx(1 / allowed)
        torch.testing.assert_close(mean, expected, rtol=0, atol=0.03)


@torch.no_grad()
def test_the_control_uses_who_is_left():
    router = router_of("random", num_experts_per_tok=3).train()
    routing = router(torch.randn(50, D), banned=torch.tensor([True, True, True, False, True]))
    assert bool(((routing.expert_ids == 3).sum(1) == 1).all())
    assert bool((routing.expert_weights.sum(1) == 1).all())


@pytest.mark.parametrize("router", sorted(ROUTERS))
@pytest.mark.parametrize("training", [False, True])
def test_a_compiler_traces_it_whole(router, training):
    one = router_of(router).train(training)
    # All routers share the code of `forward`, which is only compiled so often.
    torch.compiler.reset()
    compiled = torch.compile(one, backend="eager", fullgraph=True)
    x = rows_for(one, 7)
    torch.manual_seed(0)
    expected = one(x)
    torch.manual_seed(0)
    for found, own in zip(compiled(x), expected):
        torch.testing.assert_close(found, own)
