"""torch.compile keeps the router losses' scale: it is a tensor of the graph, not a constant in
it.
"""

from __future__ import annotations

import pytest
import torch
from core.mixtures import LEVELS, causal, tokens
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
