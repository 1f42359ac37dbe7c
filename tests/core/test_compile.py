"""torch.compile keeps the router losses' scale: it is a tensor of the graph, not a constant in
it.
"""

from __future__ import annotations

import pytest
import torch
from bases import causal_base
from core.mixtures import LEVELS, causal, into, tokens, told
from torch._dynamo.utils import counters
from training.runs import batch, gradients_of, open_window

LOSSES = {"router_aux_loss_coef": 0.5, "router_z_loss_coef": 0.1}


def _gradients(model, call, inputs, scale):
    model.zero_grad()
    open_window(model)
    (call(**inputs).loss * scale).backward()
    return gradients_of(model)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("scope", ["site", "layer", "model"])
def test_gradients_of_a_scaled_loss(scope, level):
    torch._dynamo.reset()
    model = causal(router_scope=scope, routing_level=level, **LOSSES).train()
    compiled = torch.compile(model, backend="aot_eager")
    inputs = batch()
    for scale in (0.25, 8.0):
        expected = _gradients(model, model, inputs, scale)
        got = _gradients(model, compiled, inputs, scale)
        assert expected.keys() == got.keys()
        for name in expected:
            torch.testing.assert_close(got[name], expected[name], rtol=1e-4, atol=1e-5 * scale)


CASES = [("hashed", "sequence"), ("context", "token"), ("hybrid", "token")]


@pytest.mark.parametrize("router,level", CASES)
def test_what_routers_read_beside_a_token_s_hidden_state_is_in_one_graph(router, level):
    torch._dynamo.reset()
    counters.clear()
    # One linear: tracing takes its time.
    fields = {"routing_level": level, "target_modules": ["v_proj"], **LOSSES}
    model = into(causal_base(num_hidden_layers=1), router=router, **fields).train()
    for own in model.moelora.router_list:
        # Else the context's draws noise.
        own.eval()
    inputs = batch()
    inputs |= told(model, inputs["input_ids"])
    expected = _gradients(model, model, inputs, 1.0)
    got = _gradients(model, torch.compile(model, backend="aot_eager"), inputs, 1.0)
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], rtol=1e-4, atol=1e-5)
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]


def test_shared_missing_and_dropped_experts_break_no_graph():
    torch._dynamo.reset()
    counters.clear()
    model = causal(
        num_shared_experts=1,
        experts_per_layer=[2, 3],
        expert_dropout=[0.1, 0.2, 0.3, 0.4],
        rank_pattern={"q_proj": 2},
        **LOSSES,
    ).train()
    compiled = torch.compile(model, backend="aot_eager")
    found = []
    for call in (model, compiled):
        torch.manual_seed(0)
        found.append(_gradients(model, call, batch(), 1.0))
    assert not counters["graph_break"]
    for name, expected in found[0].items():
        torch.testing.assert_close(found[1][name], expected, rtol=1e-4, atol=1e-5)


def test_accumulation_under_compile_is_the_sum():
    torch._dynamo.reset()
    model = causal(**LOSSES).train()
    compiled = torch.compile(model, backend="aot_eager")
    expected = _accumulated(model, model)
    got = _accumulated(model, compiled)
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], rtol=1e-4, atol=1e-6)


def _accumulated(model, call):
    model.zero_grad()
    open_window(model)
    for seed in (0, 1):
        ids = tokens(seed=seed)
        (call(input_ids=ids, labels=ids).loss / 2).backward()
    return gradients_of(model)
