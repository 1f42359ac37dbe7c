"""The model is its base, with more inside: its class, its signature, copies, and the way back."""

from __future__ import annotations

import copy
import inspect
import io
import pickle

import peft
import pytest
import torch
from bases import CLASSIFIERS, causal_base, classifier_base
from core.mixtures import (
    ALL_CAUSAL,
    LEVELS,
    ROUTERS_AT_LEVELS,
    SCOPES,
    causal,
    classifier,
    into,
    own_parameters,
    tokens,
    told,
)
from peft.tuners.tuners_utils import BaseTunerLayer

from moelora import MoeLoraForCausalLM, MoeLoraForSequenceClassification

CASES = [(n, causal_base, MoeLoraForCausalLM) for n in ALL_CAUSAL]
CASES += [(n, classifier_base, MoeLoraForSequenceClassification) for n in CLASSIFIERS]


@pytest.mark.parametrize("name,make,public", CASES)
def test_the_model_is_an_instance_of_its_base_s_class(name, make, public):
    base = make(name)
    cls, supported = type(base), [n for n in dir(type(base)) if n.startswith("_supports_")]
    model = into(base)
    assert isinstance(model, cls) and isinstance(model, public)
    assert model._get_name() == cls.__name__
    assert model.config_class is cls.config_class and isinstance(model.config, cls.config_class)
    assert not {n for n in vars(type(model)) if n.startswith("_supports_")}, "all inherited"
    fresh, same = (
        make(name),
        ("_no_split_modules", "_tied_weights_keys", "base_model_prefix", "main_input_name"),
    )
    for attribute in [n for n in supported if not callable(getattr(cls, n))] + list(same):
        assert getattr(model, attribute) == getattr(fresh, attribute)


@pytest.mark.parametrize("name,make,public", CASES)
def test_forward_takes_what_the_base_s_takes_and_no_other_label(name, make, public):
    theirs = inspect.signature(type(make(name)).forward).parameters
    ours = inspect.signature(into(make(name)).forward).parameters
    own = ["router_mask", "expert_routing", "expert_targets", "output_expert_routing"]
    own += ["expert_weights", "banned_experts", "router_context"]
    bare = [n for n in theirs if n != "self"]
    assert [n for n in ours if n not in own] == bare
    assert [n for n in ours if n not in bare] == own
    assert [n for n in ours if "label" in n] == ["labels"]


def test_arguments_may_come_by_position_and_outputs_as_a_tuple():
    base, ids = causal_base(), tokens()
    expected = base(ids, torch.ones_like(ids), labels=ids)
    model = into(base, active=False)
    got = model(ids, torch.ones_like(ids), labels=ids, return_dict=False)
    assert isinstance(got, tuple)
    assert torch.equal(got[0], expected.loss) and torch.equal(got[1], expected.logits)


def _state(model):
    """Everything of a base that putting a mixture in touches."""
    return {
        "class": type(model),
        "config": model.config.to_dict(),
        "keys": list(model.state_dict()),
        "modules": [n for n, _ in model.named_modules()],
        "hooks": [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()],
        "with_kwargs": [len(m._forward_pre_hooks_with_kwargs) for m in model.modules()],
        "attributes": sorted(k for k in vars(model)),
    }


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("name", ["llama", "gpt2", "mamba", "bert"])
def test_unload_gives_the_base_back(name, scope, level):
    base = classifier_base(name) if name in CLASSIFIERS and name != "llama" else causal_base(name)
    before, logits = _state(base), base(tokens()).logits
    model = into(base, probe=True, router_scope=scope, routing_level=level)
    assert not torch.allclose(model(tokens()).logits, logits, atol=1e-3)
    assert model.unload() is base
    assert _state(base) == before
    assert torch.equal(base(tokens()).logits, logits)
    again = into(base, router_scope=scope, routing_level=level)
    assert not torch.allclose(again(tokens()).logits, logits, atol=1e-3)


def test_a_base_s_own_hooks_outlive_the_mixture():
    base, seen = causal_base(), []
    base.model.layers[0].self_attn.q_proj.register_forward_hook(lambda *_: seen.append("hook"))
    base.model.layers[0].register_forward_pre_hook(lambda *_: seen.append("pre"))
    into(base, router_scope="layer").unload()
    seen.clear()
    base(tokens())
    assert sorted(seen) == ["hook", "pre"]


def _pickled(model):
    return pickle.loads(pickle.dumps(model))


def _saved(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, _pickled, _saved])
@pytest.mark.parametrize(
    "name,scope", [("llama", s) for s in SCOPES] + [("gpt2", "site"), ("bert", "site")]
)
def test_copies_are_whole_and_their_own(copied, name, scope):
    model = classifier(name) if name == "bert" else causal(name, router_scope=scope)
    logits = model(tokens()).logits
    twin = copied(model)
    assert (
        type(twin) is type(model)
        and twin.moelora_config.to_dict() == model.moelora_config.to_dict()
    )
    assert torch.equal(twin(tokens()).logits, logits)
    with torch.no_grad():
        for parameter in own_parameters(twin).values():
            parameter.zero_()
    assert not torch.allclose(twin(tokens()).logits, logits, atol=1e-3), (
        "the copy computes with its own experts"
    )
    assert torch.equal(model(tokens()).logits, logits), "and the first one with its own"
    shared = {id(p) for p in model.parameters()} & {id(p) for p in twin.parameters()}
    assert not shared
    twin.unload()
    assert torch.equal(model(tokens()).logits, logits)


def test_a_copy_in_the_middle_of_forced_experts_is_forced_too():
    model = causal()
    with model.use_experts("expert_1"):
        forced = model(tokens()).logits
        assert torch.equal(copy.deepcopy(model)(tokens()).logits, forced)


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
def test_resized_embeddings_keep_the_experts_working(name):
    model = causal(name)
    logits = model(tokens()).logits
    model.resize_token_embeddings(70, mean_resizing=False)
    after = model(tokens()).logits
    assert after.shape[-1] == 70
    torch.testing.assert_close(after[..., :64], logits, rtol=1e-5, atol=1e-6)
    assert model.generate(tokens(), max_new_tokens=2).shape[1] == 12


@pytest.mark.parametrize("router,level", ROUTERS_AT_LEVELS)
def test_peft_on_top_adapts_the_base_s_linears_and_no_router(router, level):
    model = causal(router=router, routing_level=level, num_experts=4)
    more = told(model, tokens())
    logits = model(tokens(), **more).logits
    on_top = peft.get_peft_model(
        model, peft.LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM")
    )
    inner = on_top.base_model.model
    found = [n for n, m in inner.named_modules() if isinstance(m, BaseTunerLayer)]
    assert len(found) == 14 and not [n for n in found if "moelora" in n]
    assert torch.equal(on_top(tokens(), **more).logits, logits)


def test_a_base_with_a_mixture_takes_no_second_one():
    model = causal()
    with pytest.raises(ValueError, match="unload"):
        MoeLoraForCausalLM.from_base(model)
    with pytest.raises(TypeError, match="MoeLoraForSequenceClassification"):
        MoeLoraForCausalLM.from_base(classifier_base())
    with pytest.raises(TypeError, match="not a sequence classifier"):
        MoeLoraForSequenceClassification.from_base(causal_base())
