"""torch.compile takes a whole model: `fullgraph=True` raises at any break, and numbers are eager's.

With the backend "eager", which runs what was traced: this is about tracing, not about code.
"""

from __future__ import annotations

import threading

import pytest
import torch
from bases import causal_base
from core.mixtures import into, left_padded, prompt_mask, tokens
from training.runs import gradients_of, open_window
from transformers import StaticCache

PROMPT, LENGTH = 6, 9
LOSSES = {"router_aux_loss_coef": 0.5, "router_z_loss_coef": 0.1}
WHERE = [("token", "site"), ("token", "layer"), ("token", "model"), ("sequence", "site")]
# Single tokens written into the linear's own output, or not.
CLOSE = {"rtol": 1e-5, "atol": 1e-6}


@pytest.fixture(autouse=True)
def _nothing_compiled():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def _model(level="token", scope="site", **fields):
    """Small: tracing takes its time."""
    base = causal_base(num_hidden_layers=1)
    fields = {"target_modules": ["q_proj", "down_proj"], **LOSSES, **fields}
    return into(base, routing_level=level, router_scope=scope, **fields)


def _whole(model):
    return torch.compile(model, backend="eager", fullgraph=True)


def _batch():
    """A batch whose labels begin after the prompts."""
    ids = tokens(2, LENGTH)
    inputs = {"input_ids": ids, "labels": ids.masked_fill(prompt_mask(ids, 4), -100)}
    return inputs | {"attention_mask": torch.ones_like(ids)}


def _step(model, call, inputs):
    """The loss and all gradients of a training step."""
    model.train()
    model.zero_grad()
    open_window(model)
    loss = call(**inputs).loss
    loss.backward()
    return {"loss": loss.detach(), **gradients_of(model)}


def _check_step(model, inputs, compiled):
    found = _step(model, compiled, inputs)
    expected = _step(model, model, inputs)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, **CLOSE, msg=name)


@torch.no_grad()
def _check_evaluation(model, inputs, compiled):
    model.eval()
    torch.testing.assert_close(compiled(**inputs).logits, model(**inputs).logits, **CLOSE)


@pytest.mark.parametrize("level,scope", WHERE)
def test_training_and_then_evaluation_of_one_compiled_model(level, scope):
    """Nothing ran eagerly before: what a thread has not set yet must not be missing."""
    model = _model(level, scope)
    compiled = _whole(model)
    inputs = _batch()
    _check_step(model, inputs, compiled)
    _check_evaluation(model, inputs, compiled)


def test_in_a_thread_that_ran_nothing_before():
    model = _model()
    compiled = _whole(model)
    found = []

    @torch.no_grad()
    def run():
        found.append(compiled(input_ids=tokens(2, LENGTH)).logits)

    for _ in range(2):
        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
    with torch.no_grad():
        expected = model(tokens(2, LENGTH)).logits
    assert len(found) == 2
    for logits in found:
        torch.testing.assert_close(logits, expected, **CLOSE)


def _decoded(model, call):
    """Logits of three tokens, each after the prompt and those before in a static cache."""
    ids = tokens(2, LENGTH)
    cache = StaticCache(config=model.config, max_cache_len=16)
    outputs = model(ids[:, :PROMPT], past_key_values=cache, use_cache=True)
    kept = {}
    if model.moelora.routes_prompts:
        kept["expert_routing"] = outputs.expert_routing
    logits = []
    for t in range(PROMPT, LENGTH):
        positions = torch.full((2, 1), t)
        inputs = {"input_ids": ids[:, t : t + 1], "position_ids": positions, **kept}
        outputs = call(**inputs, past_key_values=cache, use_cache=True)
        logits.append(outputs.logits)
    return torch.cat(logits, dim=1)


@torch.no_grad()
@pytest.mark.parametrize("level,scope", WHERE)
def test_decoding_with_a_static_cache(level, scope):
    model = _model(level, scope)
    found = _decoded(model, _whole(model))
    torch.testing.assert_close(found, _decoded(model, model), **CLOSE)


@torch.no_grad()
def test_a_static_cache_is_noted_the_routing_that_a_graph_was_given():
    """Also one that it did not have before: a later step may come with the cache alone."""
    model = _model("sequence")
    ids = tokens(2, LENGTH)
    others = model(ids.flip(1)).expert_routing
    results = []
    for call in (model, _whole(model)):
        cache = StaticCache(config=model.config, max_cache_len=16)
        model(ids[:, :PROMPT], past_key_values=cache, use_cache=True)
        for t in (PROMPT, PROMPT + 1):
            inputs = {"input_ids": ids[:, t : t + 1], "position_ids": torch.full((2, 1), t)}
            call(**inputs, past_key_values=cache, use_cache=True, expert_routing=others)
        last = {"input_ids": ids[:, -1:], "position_ids": torch.full((2, 1), LENGTH - 1)}
        results.append(model(**last, past_key_values=cache, use_cache=True).logits)
    torch.testing.assert_close(results[1], results[0], **CLOSE)


ORTHOGONAL = {"router_bias_update_rate": 0.01, "null_expert": True, "share_lora_A": True}
# What a caller may pass, each in a small model of these fields.
VARIANTS = {
    "padding, targets, bans, routing out": (
        {},
        lambda model: {
            **left_padded([tokens(1, LENGTH)[0], tokens(1, 5, seed=4)[0]]),
            "expert_targets": torch.tensor([3, -100]),
            "banned_experts": model.moelora_config.expert_names[:1],
            "output_expert_routing": True,
        },
    ),
    "weights of experts": (
        {},
        lambda model: {"expert_weights": torch.tensor([[0.5, 0, 0.5, 0], [0, 0, 0, 1.0]])},
    ),
    "routing in": (
        {},
        lambda model: {
            "expert_routing": model(tokens(2, LENGTH), output_expert_routing=True).expert_routing
        },
    ),
    "router_mask": (
        {"routing_level": "sequence"},
        lambda model: {"router_mask": prompt_mask(tokens(2, LENGTH), 4)},
    ),
    "fields": (ORTHOGONAL, lambda model: {}),
}


def _small(**fields):
    base = causal_base(num_hidden_layers=1)
    return into(base, **{"target_modules": ["v_proj"], **LOSSES, **fields})


@pytest.mark.parametrize("name", VARIANTS)
def test_what_a_caller_passes(name):
    fields, more = VARIANTS[name]
    model = _small(**fields)
    with torch.no_grad():
        inputs = {**_batch(), **more(model)}
    _check_step(model, inputs, _whole(model))


WRONG = {
    "expert_targets": {"expert_targets": torch.tensor([0, 4])},
    "banned": {"expert_weights": torch.ones(4), "banned_experts": ["expert_1"]},
    "router_mask": {"router_mask": torch.arange(2)[:, None].expand(2, LENGTH).bool()},
}


@torch.no_grad()
@pytest.mark.parametrize("name", WRONG)
def test_wrong_values_raise_also_where_no_value_can_be_looked_at(name):
    level = "sequence" if name == "router_mask" else "token"
    compiled = _whole(_small(routing_level=level))
    with pytest.raises(RuntimeError, match=name):
        compiled(tokens(2, LENGTH), **WRONG[name])


@torch.no_grad()
def test_use_experts_holds_inside_and_not_after():
    """It is read by thread and task, which no graph can: there the graph breaks."""
    model = _small()
    compiled = torch.compile(model, backend="eager")
    names = model.moelora_config.expert_names
    ids = tokens(2, LENGTH)
    found = [compiled(ids).logits]
    expected = [model(ids).logits]
    for arguments in ({"experts": names[0]}, {"ban": names[:2]}):
        with model.use_experts(**arguments):
            found.append(compiled(ids).logits)
            expected.append(model(ids).logits)
    found.append(compiled(ids).logits)
    expected.append(expected[0])
    for own, eager in zip(found, expected):
        torch.testing.assert_close(own, eager, **CLOSE)
    assert not expected[0].allclose(expected[1]) and not expected[1].allclose(expected[2])
