"""Asking for the routing alone: the same routing as a whole forward pass, earlier, and with
gradients.
"""

from __future__ import annotations

import pytest
import torch
from bases import CAUSAL
from core.mixtures import LEVELS, NO_ROUTER_LOSS, SCOPES, causal, left_padded, tokens

from moelora.core.forward_pass import running_pass


def counted(model) -> list[int]:
    """Which decoder layers ran, as they run."""
    ran: list[int] = []
    for number, layer in enumerate(model.model.layers):
        layer.self_attn.register_forward_pre_hook(lambda m, a, n=number: ran.append(n))
    return ran


@torch.no_grad()
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("scope", SCOPES)
def test_it_is_the_routing_of_the_whole_forward(scope, level):
    model = causal(router_scope=scope, routing_level=level)
    batch = left_padded([tokens(1, n, seed=n)[0] for n in (4, 9)])
    whole = model(**batch, output_expert_routing=True).expert_routing
    alone = model.routing_only(**batch)
    assert len(whole) == len(alone) == len(model.moelora.routers)
    for one, other in zip(whole, alone):
        assert all(torch.equal(a, b) for a, b in zip(one, other))


@torch.no_grad()
@pytest.mark.parametrize("name", sorted(CAUSAL))
def test_on_every_base_it_leaves_nothing_behind(name):
    model = causal(name, router_scope="model", routing_level="sequence")
    before = model(tokens()).logits
    model.route(input_ids=tokens(seed=9))
    assert running_pass(model.moelora) is None
    assert torch.equal(model(tokens()).logits, before)
    out = model(tokens(), output_hidden_states=True)
    assert len(out.hidden_states) == 3 and torch.equal(out.logits, before)


@torch.no_grad()
@pytest.mark.parametrize("layer", [0, 1])
def test_a_models_router_stops_the_forward_where_it_reads(layer):
    model = causal(router_scope="model", router_layer=layer, routing_level="sequence")
    ran = counted(model)
    model.route(input_ids=tokens())
    assert ran == list(range(layer))
    model(tokens())
    assert ran == [*range(layer), 0, 1]


@torch.no_grad()
def test_forced_experts_are_what_a_report_shows():
    model = causal(router_scope="model", routing_level="sequence")
    with model.use_experts({"expert_2": 1.0}):
        report = model.route(input_ids=tokens())
    assert (
        report.top_experts() == ["expert_2"] * 2
        and report.probabilities.tolist() == [[0, 0, 1, 0]] * 2
    )


@torch.no_grad()
@pytest.mark.parametrize("level", LEVELS)
def test_probabilities_are_the_mean_over_tokens_and_routers(level):
    model = causal(router_scope="layer", routing_level=level)
    batch = left_padded([tokens(1, n, seed=n)[0] for n in (4, 9)])
    report = model.route(**batch)
    torch.testing.assert_close(report.probabilities.sum(1), torch.ones(2))
    expected = torch.zeros(2, 4)
    for routing in report.routing:
        rows = routing.logits.softmax(-1)
        if level == "token":
            rows = torch.stack([row[-n:].mean(0) for row, n in zip(rows.view(2, 9, 4), (4, 9))])
        expected += rows / len(report.routing)
    torch.testing.assert_close(report.probabilities, expected)


@pytest.mark.parametrize("reentrant", [None, False, True])
@pytest.mark.parametrize("scope", SCOPES)
def test_its_gradients_are_those_of_expert_targets(scope, reentrant):
    fields = {**NO_ROUTER_LOSS, "router_scope": scope, "routing_level": "sequence"}
    targets = torch.tensor([2, 0])
    model = causal(**fields).train()
    if reentrant is not None:
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    losses = [
        torch.nn.functional.cross_entropy(r.logits, targets)
        for r in model.routing_only(input_ids=tokens())
    ]
    (sum(losses) / len(losses)).backward()
    found = {name: p.grad.clone() for name, p in model.moelora.routers.named_parameters()}
    other = causal(**fields).train()
    mask = torch.ones_like(tokens(), dtype=torch.bool)
    out = other(tokens(), router_mask=mask, expert_targets=targets)
    # A loss that the experts' outputs do not reach: what is left is the router loss.
    (0 * out.logits.sum()).backward()
    for name, parameter in other.moelora.routers.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-5, atol=1e-7)
