"""An activation between the halves of the Triton kernels: eager's logits, gradients and tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from core.adapter_forms import made

from moelora.core.forward_pass import ForwardPass

INPUT = torch.arange(2 * 7).view(2, 7) % 11 + 3
# By the path that a few tokens of them take.
PATHS: dict[str, dict[str, Any]] = {
    "dense": {},
    "sequence": {"num_experts": 33, "r": 8},
    "prompts": {"routing_level": "sequence"},
    "mixed ranks": {"r": [1, 2, 3, 5]},
}


def on(model: Any, backend: str) -> Any:
    model.moelora.backend = backend
    return model


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("kind", ["block", "series block"])
def test_logits_and_gradients(kind: str, path: str) -> None:
    model = made("opt", kind, "gelu", layers_to_transform=1, **PATHS[path])
    ids = INPUT.repeat(1, 3) if path == "prompts" else INPUT
    given = {"router_mask": torch.ones_like(ids, dtype=torch.bool)} if path == "prompts" else {}
    given["router_mask"] = given["router_mask"].tril(5) if given else None
    results = {}
    for backend in ("eager", "triton"):
        model.zero_grad()
        outputs = on(model, backend)(ids, labels=ids, **given)
        outputs.loss.backward()
        grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        results[backend] = {"logits": outputs.logits.detach(), **grads}
    assert len(results["eager"]) == 4 and results["eager"].keys() == results["triton"].keys()
    for name, wanted in results["eager"].items():
        torch.testing.assert_close(results["triton"][name], wanted, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("activation", [None, "tanh"])
@pytest.mark.parametrize("kind", ["block", "series block"])
def test_kernels_that_route_while_they_expand_take_no_activation(
    kind: str, activation: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, plans = made("opt", kind, activation, layers_to_transform=1), []
    plan_of = ForwardPass._decode_plan

    def seen(*args: Any) -> Any:
        plans.append(plan_of(*args))
        return plans[-1]

    monkeypatch.setattr(ForwardPass, "_decode_plan", seen)
    tokens = {
        backend: on(model, backend).generate(INPUT, max_new_tokens=3, do_sample=False)
        for backend in ("eager", "triton")
    }
    assert torch.equal(tokens["eager"], tokens["triton"])
    # Routed by the kernels all the same, but before they expand.
    paths = {plan.path for plan in plans if plan is not None}
    assert paths == ({"decode"} if activation is None else {"dense"})
