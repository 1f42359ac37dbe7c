"""guidance_scale: the unconditional pass has the caller's experts, as the conditional one has."""

from __future__ import annotations

import pytest
import torch
from core.decoding import GREEDY, guided_by_hand
from core.mixtures import LEVELS, causal, tokens
from transformers import UnbatchedClassifierFreeGuidanceLogitsProcessor as Guidance

PROMPT = 7


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("own", ["weights of all", "weights of each", "bans"])
def test_what_is_forced_or_banned_holds_for_the_unconditional_pass_too(own, level):
    model = causal(routing_level=level)
    weights = torch.tensor([[0.0, 1.5, 0.0, 0.5], [1.0, 0.0, 0.0, 0.0]])
    inputs = {
        "weights of all": {"expert_weights": weights[0]},
        "weights of each": {"expert_weights": weights},
        "bans": {"banned_experts": ["expert_0", "expert_2"]},
    }[own]
    ids = tokens(2, PROMPT)
    negative = tokens(2, 4, seed=12)
    guided = {"guidance_scale": 2.0, "negative_prompt_ids": negative, **GREEDY}
    expected = guided_by_hand(model, ids, negative, inputs)
    assert torch.equal(model.generate(ids, **inputs, **guided), expected)
    if own == "weights of each":
        of_tokens = weights[:, None].expand(2, PROMPT, 4)
        with pytest.raises(ValueError, match=r"guidance_scale.*expert_weights.*\[batch, E\]"):
            model.generate(ids, expert_weights=of_tokens, **guided)
        # It is another prompt, and the conditional pass alone may have them.
        assert len(model.generate(ids, expert_weights=of_tokens, **GREEDY)) == 2


def test_a_processor_of_the_caller_s_own_keeps_its_model():
    model = causal()
    own = Guidance(2.0, model, tokens(1, 4, seed=12))
    model.generate(tokens(1, PROMPT), logits_processor=[own], **GREEDY)
    assert own.model is model
