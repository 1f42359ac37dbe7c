"""Gradient checkpointing, of both kinds, gives the gradients and the counts of none."""

from __future__ import annotations

import pytest
import torch
from core.mixtures import (
    ALL_CAUSAL,
    LEVELS,
    SCOPES,
    causal,
    classifier,
    expert_parameters,
    refused_by_old_transformers,
)
from training.runs import (
    LOSSES,
    assert_same,
    batch,
    classes,
    gradients,
    gradients_of,
    open_window,
    rows_of,
    train,
)
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING

KINDS = {"reentrant": True, "non_reentrant": False}
CHECKPOINTING = [
    name
    for name in ALL_CAUSAL
    if MODEL_FOR_CAUSAL_LM_MAPPING[CONFIG_MAPPING[name]].supports_gradient_checkpointing
]
# One step in fp32, where recomputing may add up gradients in another order.
FP32 = 1e-5


def _checkpointed(model, kind):
    model.gradient_checkpointing_enable({"use_reentrant": KINDS[kind]})
    assert model.is_gradient_checkpointing
    return model


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("level", LEVELS)
def test_checkpointing_has_the_gradients_of_none(level, scope, kind):
    model = causal(routing_level=level, router_scope=scope, **LOSSES)
    inputs = {**batch(), "expert_targets": torch.tensor([0, 1, 2, -100])}
    expected = gradients(model, **inputs)
    counts = model.moelora.load.current.clone()
    with refused_by_old_transformers(scope, KINDS[kind]) as refused:
        assert_same(gradients(_checkpointed(model, kind), **inputs), expected, FP32)
    assert refused or torch.equal(model.moelora.load.current, counts)


@pytest.mark.parametrize("kind", KINDS)
def test_recomputing_draws_the_same_jitter_and_dropout(kind):
    model = causal("gpt2", router_jitter_noise=0.3, lora_dropout=0.3, **LOSSES)
    expected = gradients(model, **batch())
    assert_same(gradients(_checkpointed(model, kind), **batch()), expected, FP32)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("level", LEVELS)
def test_a_checkpointed_classifier_has_the_gradients_of_none(level, kind):
    model = classifier("bert", routing_level=level, **LOSSES)
    expected = gradients(model, **classes())
    assert_same(gradients(_checkpointed(model, kind), **classes()), expected, FP32)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", CHECKPOINTING)
def test_every_trainable_parameter_gets_its_gradient(name, kind):
    """Frozen embeddings: reentrant checkpointing drops a layer whose input needs no gradient."""
    model = causal(name, **LOSSES)
    expected = gradients(model, **batch())
    assert all(g.abs().max() > 0 for g in expected.values())
    _checkpointed(model, kind)
    # Newer versions of transformers make the embeddings' output need a gradient, which hides the
    # trap.
    model.disable_input_require_grads()
    assert_same(gradients(model, **batch()), expected, FP32)


def test_nearly_every_base_can_be_checkpointed():
    assert len(CHECKPOINTING) >= len(ALL_CAUSAL) - 1


@pytest.mark.parametrize("kind", KINDS)
def test_two_forward_passes_before_the_backward_keep_their_own_routings(kind):
    """Each recomputation sees its own forward's state, not the last one's."""
    first, second = batch(), batch(rows=2, length=7, seed=9)
    model = causal(routing_level="sequence", router_scope="layer", **LOSSES)

    def both(model):
        open_window(model)
        model.train().zero_grad()
        losses = [model(**inputs).loss for inputs in (first, second)]
        (losses[0] + 3 * losses[1]).backward()
        return gradients_of(model)

    expected = both(model)
    assert_same(both(_checkpointed(model, kind)), expected, FP32)


@pytest.mark.parametrize("kind", KINDS)
def test_trainer_checkpoints_and_accumulates(kind, tmp_path):
    def run(**settings):
        model = causal(router_scope="layer", **LOSSES)
        open_window(model)
        settings = {"max_steps": 2, "optim": "sgd", "gradient_accumulation_steps": 2, **settings}
        return train(model, rows_of(batch(8)), tmp_path, per_device_train_batch_size=2, **settings)

    plain = run()
    found = run(
        gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": KINDS[kind]}
    )
    for gradient, expected in zip(found.gradients, plain.gradients):
        assert_same(gradient, expected, 1e-4)  # two steps in fp32
    assert all(torch.equal(a, b) for a, b in zip(found.current, plain.current))


@pytest.mark.parametrize("kind", KINDS)
def test_checkpointing_keeps_fewer_tensors(kind):
    """What autograd saves between forward and backward, in bytes: the point of it all."""

    def saved(model):
        seen = {}

        def keep(tensor):
            storage = tensor.untyped_storage()
            seen[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            loss = model.train()(**batch(rows=8, length=32)).loss
        assert loss.requires_grad
        return sum(seen.values())

    model = causal(**LOSSES)
    plain = saved(model)
    assert saved(_checkpointed(model, kind)) < 0.6 * plain


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scope", SCOPES)
def test_recomputing_after_the_forcing_has_ended_still_forces(scope, kind):
    model = causal(router_scope=scope, **LOSSES).train()
    factors = list(expert_parameters(model).values())

    def forced_gradients():
        with model.use_experts({"expert_1": 0.5, "expert_2": 1.0}):
            loss = model(**batch()).loss
        return _accumulated(loss, factors)

    expected = forced_gradients()
    _checkpointed(model, kind)
    with refused_by_old_transformers(scope, KINDS[kind]):
        for now, then in zip(forced_gradients(), expected, strict=True):
            torch.testing.assert_close(now, then, rtol=FP32, atol=FP32)


def _accumulated(loss, parameters):
    """Gradients by `backward`, since reentrant checkpointing refuses `torch.autograd.grad`; none
    are left.
    """
    loss.backward()
    found = [p.grad for p in parameters]
    for parameter in parameters:
        parameter.grad = None
    return found
