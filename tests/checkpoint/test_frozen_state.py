"""Raw state dicts between mixtures in which other experts are frozen, or that have others."""

from __future__ import annotations

import io

import pytest
import torch
from checkpoint.stored import logits
from core.mixtures import causal, own_parameters
from torch import nn

REMEDY = "from_pretrained.*add_expert or remove_expert.*freeze_experts or unfreeze_experts"


def mixture(*frozen, **fields):
    """A mixture of equal ranks: nothing but who was frozen says whose rows are whose."""
    model = causal(**fields)
    model.freeze_experts(frozen)
    return model


def zeroed(model):
    with torch.no_grad():
        for parameter in own_parameters(model).values():
            parameter.zero_()
    return model


FROZEN = [(), ("expert_1",), ("expert_2",), ("expert_0", "expert_3")]


@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize("then", FROZEN, ids=str)
@pytest.mark.parametrize("now", FROZEN, ids=str)
def test_a_raw_state_dict_goes_into_one_with_other_experts_frozen(now, then, share, tmp_path):
    saved = mixture(*then, share_lora_A=share)
    file = io.BytesIO()
    torch.save(saved.state_dict(), file)
    file.seek(0)
    model = zeroed(mixture(*now, share_lora_A=share))
    frozen = next(model.moelora.factors()).frozen_experts
    model.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(logits(model), logits(saved))
    assert next(model.moelora.factors()).frozen_experts == frozen
    # As a part of another module, by torch's own loading.
    other = zeroed(mixture(*now, share_lora_A=share))
    nn.ModuleDict({"m": other}).load_state_dict(nn.ModuleDict({"m": saved}).state_dict())
    assert torch.equal(logits(other), logits(saved))


def more(*frozen):
    model = causal()
    model.add_expert("fifth")
    model.freeze_experts(frozen)
    return model


OTHERS = {
    "frozen there": (mixture, lambda: mixture("expert_0", "expert_1")),
    "fewer frozen here": (lambda: mixture("expert_1"), lambda: mixture("expert_0", "expert_1")),
    "an expert more": (mixture, more),
    "an expert more and one frozen": (lambda: mixture("expert_0"), lambda: more("expert_0")),
}


@pytest.mark.parametrize("ours,theirs", OTHERS.values(), ids=OTHERS)
def test_where_nobody_says_who_was_frozen_the_remedy_is_named(ours, theirs):
    model = ours()
    before = logits(model)
    # What a plain dict, as some engines gather it, has lost.
    state = dict(theirs().state_dict())
    with pytest.raises(RuntimeError, match=f"(?s)(frozen_weight|has shape).*{REMEDY}"):
        model.load_state_dict(state)
    assert torch.equal(logits(model), before)
    with pytest.raises(RuntimeError) as raised:
        nn.ModuleDict({"m": model}).load_state_dict({f"m.{k}": t for k, t in state.items()})
    text = str(raised.value)
    assert text.count("from_pretrained") == 1 and text.count("size mismatch for") > 4
