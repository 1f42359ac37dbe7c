"""Our inputs of a forward: what does not fit says what came, what was expected, and the remedy."""

from __future__ import annotations

import pytest
import torch
from core.mixtures import LEVELS, causal, tokens

WRONG = {
    "only misspelt": ({"output_expert_routing": "onyl"}, ValueError, "'onyl'.*'only'"),
    "a number": ({"output_expert_routing": 1}, ValueError, "output_expert_routing=1"),
    "targets as a list": ({"expert_targets": [0, 1]}, TypeError, "expert_targets is a list"),
    "targets as text": ({"expert_targets": "math"}, TypeError, "expert_targets is a str"),
    "bans as a number": ({"banned_experts": 5}, TypeError, "banned_experts names 5"),
    "bans as a tensor": ({"banned_experts": torch.tensor([1])}, TypeError, "banned_experts names"),
    "routing as a tensor": ({"expert_routing": torch.ones(2)}, TypeError, "expert_routing is a"),
    "routing of too few": ({"expert_routing": ()}, ValueError, "of 0 routers"),
    "one axis": ({"input_ids": torch.arange(5)}, ValueError, r"input_ids has shape \[5\]"),
    "embeddings": (
        {"input_ids": None, "inputs_embeds": torch.ones(2, 3)},
        ValueError,
        r"inputs_embeds has shape \[2, 3\]",
    ),
}


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("inputs,kind,message", WRONG.values(), ids=WRONG)
def test_wrong_inputs(inputs, kind, message, level):
    model = causal(routing_level=level)
    with pytest.raises(kind, match=message):
        model(**{"input_ids": tokens(), **inputs})
    model(tokens())


def test_a_router_mask_of_another_type():
    with pytest.raises(TypeError, match="router_mask is a list"):
        causal(routing_level="sequence")(tokens(), router_mask=[[True] * 10] * 2)


@pytest.mark.parametrize("experts", [5, None, [5], {5: 1.0}, object()])
def test_experts_to_use_of_another_type(experts):
    model = causal()
    with pytest.raises((TypeError, ValueError)) as raised, model.use_experts(experts):
        pass
    assert "expert" in str(raised.value)


@torch.no_grad()
@pytest.mark.parametrize("scope", ["site", "layer", "model"])
def test_a_token_levels_routing_can_be_used_again(scope):
    model = causal(router_scope=scope)
    first = model(tokens(), output_expert_routing=True)
    other = tokens(seed=11)
    again = model(other, expert_routing=first.expert_routing)
    assert not torch.allclose(again.logits, model(other).logits, atol=1e-4)
    same = model(tokens(), expert_routing=first.expert_routing)
    torch.testing.assert_close(same.logits, first.logits)
    with pytest.raises(ValueError, match="20 rows for 2 × 4 tokens"):
        model(tokens(2, 4), expert_routing=first.expert_routing)


def test_forward_says_what_our_inputs_are():
    model = causal()
    for name in ("router_mask", "expert_routing", "expert_targets", "output_expert_routing"):
        assert f"    {name} (" in type(model).forward.__doc__
    assert "router_context (" in model.forward.__doc__
    assert (
        "expert_weights (" in model.forward.__doc__ and "banned_experts (" in model.forward.__doc__
    )


def test_data_parallel_is_refused():
    model = causal()
    replica = model._replicate_for_data_parallel()
    with pytest.raises(RuntimeError, match="DistributedDataParallel"):
        replica(tokens())
