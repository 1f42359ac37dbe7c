"""A whole model on the Triton backend: eager's logits, gradients and generated tokens."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from core.mixtures import NO_ROUTER_LOSS, causal

from moelora.core.forward_pass import ForwardPass

INPUT = torch.arange(2 * 7).view(2, 7) % 11 + 3
SCOPES = [
    ("token", "site"),
    ("token", "projection"),
    ("token", "layer"),
    ("sequence", "site"),
    ("sequence", "model"),
]


@pytest.fixture(params=SCOPES, ids="-".join)
def model(request: pytest.FixtureRequest) -> Iterator[Any]:
    level, scope = request.param
    yield causal(routing_level=level, router_scope=scope)


def on(model: Any, backend: str) -> Any:
    model.moelora.backend = backend
    return model


def test_logits_and_gradients(model: Any) -> None:
    results = {}
    for backend in ("eager", "triton"):
        model.zero_grad()
        outputs = on(model, backend)(INPUT, labels=INPUT, router_mask=mask_of(model))
        outputs.loss.backward()
        grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        results[backend] = {"logits": outputs.logits.detach(), **grads}
    assert len(results["eager"]) > 10 and results["eager"].keys() == results["triton"].keys()
    for name, wanted in results["eager"].items():
        torch.testing.assert_close(results["triton"][name], wanted, rtol=1e-4, atol=1e-5, msg=name)


def test_generated_tokens(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded = []
    plan_of = ForwardPass._decode_plan

    def seen(*args: Any) -> Any:
        decoded.append(plan_of(*args))
        return decoded[-1]

    monkeypatch.setattr(ForwardPass, "_decode_plan", seen)
    tokens = {}
    for backend in ("eager", "triton"):
        decoded.clear()
        tokens[backend] = on(model, backend).generate(INPUT, max_new_tokens=4, do_sample=False)
    assert torch.equal(tokens["eager"], tokens["triton"])
    config = model.moelora_config
    own = config.routing_level == "token" and config.router_scope in ("site", "projection")
    assert any(plan is not None for plan in decoded) == own


@pytest.mark.parametrize(
    ("options", "path"),
    [
        ({"null_expert": True}, "decode"),
        ({"null_expert": True, "router_input_norm": True}, "decode"),
        ({"num_experts": 70, "null_expert": True}, "dense"),
    ],
    ids=["null expert", "input norm", "70 experts"],
)
def test_the_kernels_route_every_kind_of_top_k(
    options: dict[str, Any], path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, plans = causal(**options), []
    plan_of = ForwardPass._decode_plan
    monkeypatch.setattr(
        ForwardPass, "_decode_plan", lambda *args: plans.append(plan_of(*args)) or plans[-1]
    )
    model.eval()
    with torch.no_grad():
        wanted = on(model, "eager")(INPUT[:, :2]).logits
        plans.clear()
        logits = on(model, "triton")(INPUT[:, :2]).logits
    torch.testing.assert_close(logits, wanted, rtol=1e-4, atol=1e-5)
    assert {plan.path for plan in plans} == {path}


@pytest.mark.parametrize(
    ("options", "routed"),
    [
        ({"num_shared_experts": 1}, {False}),
        ({"experts_per_layer": [2, 4]}, {False, True}),
        ({"rank_pattern": {"q_proj": 20, "up_proj": 1}}, {True}),
    ],
    ids=["shared expert", "fewer in a layer", "ranks by pattern"],
)
def test_the_kernels_leave_to_us_what_they_do_not_know(
    options: dict[str, Any], routed: set[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, plans = causal(**options), []
    plan_of = ForwardPass._decode_plan
    monkeypatch.setattr(
        ForwardPass, "_decode_plan", lambda *args: plans.append(plan_of(*args)) or plans[-1]
    )
    with torch.no_grad():
        wanted = on(model, "eager")(INPUT[:, :2]).logits
        plans.clear()
        logits = on(model, "triton")(INPUT[:, :2]).logits
    torch.testing.assert_close(logits, wanted, rtol=1e-4, atol=1e-5)
    assert {plan is not None for plan in plans} == routed


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_shared_absent_and_dropped_experts_train(level: str) -> None:
    fields = {"num_shared_experts": 1, "experts_per_layer": [2, 3], "expert_dropout": 0.4}
    model = causal(routing_level=level, **fields, **NO_ROUTER_LOSS).train()
    grads = []
    for backend in ("eager", "triton"):
        model.zero_grad()
        torch.manual_seed(0)
        on(model, backend)(INPUT, labels=INPUT, router_mask=mask_of(model)).loss.backward()
        grads.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    assert len(grads[0]) > 10 and grads[0].keys() == grads[1].keys()
    for name, wanted in grads[0].items():
        torch.testing.assert_close(grads[1][name], wanted, rtol=1e-4, atol=1e-5, msg=name)


def test_gradient_checkpointing_gives_the_same_bits() -> None:
    model = on(causal(**NO_ROUTER_LOSS), "triton").train()
    grads = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        model(INPUT, labels=INPUT).loss.backward()
        grads.append(
            {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        )
    for name, grad in grads[0].items():
        assert torch.equal(grad, grads[1][name]), name


def test_a_shared_A_is_shrunk_with_and_decoded_with() -> None:
    model = causal(share_lora_A=True)
    test_logits_and_gradients(model)
    few = []
    for backend in ("eager", "triton"):
        with torch.no_grad():
            few.append(on(model.eval(), backend)(INPUT[:, :2]).logits)
    torch.testing.assert_close(few[1], few[0], rtol=1e-4, atol=1e-5)


def mask_of(model: Any) -> torch.Tensor | None:
    """At sequence level the first three tokens are the prompt."""
    if model.moelora_config.routing_level == "token":
        return None
    return (torch.arange(7) < 3).expand(2, 7)


@pytest.mark.parametrize("forced", ["banned", "weighted"])
def test_what_is_forced_or_banned_is_not_left_to_the_kernels_own_routing(
    forced: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The decode path chooses the experts itself, and knows of no ban."""
    model, plans = causal(), []
    plan_of = ForwardPass._decode_plan
    monkeypatch.setattr(
        ForwardPass, "_decode_plan", lambda *args: plans.append(plan_of(*args)) or plans[-1]
    )
    given = (
        {"banned_experts": ["expert_1"]}
        if forced == "banned"
        else {"expert_weights": torch.randn(2, 4)}
    )
    with torch.no_grad():
        wanted = on(model, "eager")(INPUT, **given).logits
        torch.testing.assert_close(
            on(model, "triton")(INPUT, **given).logits, wanted, rtol=1e-4, atol=1e-5
        )
        assert not any(plans)
        with model.use_experts(ban="expert_1"):
            on(model, "triton")(INPUT)
        assert not any(plans)
        model(INPUT)
    assert plans[-1] is not None, "with nothing forced they do"
