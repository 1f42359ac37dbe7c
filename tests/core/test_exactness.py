"""A new mixture is its base, bit for bit; one expert is PEFT's LoRA; a forced one its adapter."""

from __future__ import annotations

import peft
import pytest
import torch
from bases import CLASSIFIERS, causal_base, classifier_base
from core.mixtures import (
    ALL_CAUSAL,
    LEVELS,
    SCOPES,
    activate,
    factors,
    into,
    left_padded,
    own_parameters,
    tokens,
)

# The same sums in another order, through two layers: about a hundred units in the last place.
TOLERANCE = {torch.float32: 1e-5, torch.float64: 2e-14}
MIXED_RANKS = {
    "num_experts": 3,
    "r": [2, 4, 8],
    "lora_alpha": [4, 4, 24],
    "expert_names": ["math", "code", "law"],
}


def _causal_batch():
    """Rows of 9 and 6 tokens, padded on the left; the last 4 tokens of each are labels."""
    inputs = left_padded([tokens(1, 9)[0], tokens(1, 6, seed=4)[0]])
    labels = inputs["input_ids"].clone()
    labels[:, :-4] = -100
    return {**inputs, "labels": labels}


def _classifier_batch():
    return {**left_padded([tokens(1, 9)[0], tokens(1, 6)[0]]), "labels": torch.tensor([0, 2])}


def _seeded(model, inputs, training):
    """Logits and loss in one mode; one seed, so that the base's dropout is the same if nobody else
    draws.
    """
    model.train(training)
    torch.manual_seed(5)
    outputs = model(**inputs)
    return outputs.logits.detach().clone(), outputs.loss.detach().clone()


def _assert_new_mixture_is_base(base, inputs, **fields):
    expected = [_seeded(base, inputs, training) for training in (False, True)]
    model = into(base, active=False, **fields)
    for training, before in zip((False, True), expected):
        after = _seeded(model, inputs, training)
        assert torch.equal(after[0], before[0]), f"logits, training={training}"
        assert torch.equal(after[1], before[1]), f"loss, training={training}"
    changed, _ = _seeded(activate(model), inputs, False)
    assert changed.dtype == expected[0][0].dtype
    assert not torch.allclose(changed, expected[0][0], atol=1e-3), (
        "experts that are not zero change nothing"
    )


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("name", ALL_CAUSAL)
def test_new_mixture_is_the_base_bit_for_bit(name, level):
    _assert_new_mixture_is_base(causal_base(name), _causal_batch(), routing_level=level)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("name", CLASSIFIERS)
def test_new_mixture_in_a_classifier_is_the_base_bit_for_bit(name, level):
    _assert_new_mixture_is_base(classifier_base(name), _classifier_batch(), routing_level=level)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("name", ["llama", "gptj"])
def test_new_mixture_is_the_base_in_every_scope(name, scope, level):
    _assert_new_mixture_is_base(
        causal_base(name), _causal_batch(), routing_level=level, router_scope=scope
    )


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("name", ["llama", "gpt2", "mamba"])
def test_new_mixture_in_a_bf16_base_is_the_base_and_keeps_fp32_masters(name, level):
    base = causal_base(name).to(torch.bfloat16)
    _assert_new_mixture_is_base(base, _causal_batch(), routing_level=level)
    assert {p.dtype for p in own_parameters(base).values()} == {torch.float32}


def _twin(base, model, experts):
    """PEFT's LoRA on `base` with the `experts` (expert: weight) of `model`, all of them active."""
    config = model.moelora_config
    alphas = config._per_expert("lora_alpha")
    twin = None
    for e, weight in experts.items():
        lora = peft.LoraConfig(
            r=config.ranks[e],
            lora_alpha=alphas[e] * weight,
            use_rslora=config.use_rslora,
            target_modules=list(factors(model, e)),
        )
        if twin is None:
            twin = peft.get_peft_model(base, lora, adapter_name=f"a{e}")
        else:
            twin.add_adapter(f"a{e}", lora)
        with torch.no_grad():
            for name, (a, b) in factors(model, e).items():
                layer = twin.base_model.model.get_submodule(name)
                layer.lora_A[f"a{e}"].weight.copy_(a)
                layer.lora_B[f"a{e}"].weight.copy_(b)
    twin.base_model.set_adapter([f"a{e}" for e in experts])
    return twin.eval()


def _assert_near(got, expected):
    scale = expected.abs().max()
    assert scale > 0
    assert (got - expected).abs().max() <= TOLERANCE[expected.dtype] * scale


def _backward(model):
    """Logits of a batch, and the gradient that a random cotangent gives to the embeddings that go
    in.
    """
    embeddings = model.get_input_embeddings()(tokens()).detach().requires_grad_()
    logits = model(inputs_embeds=embeddings).logits
    cotangent = torch.randn(logits.shape, generator=torch.Generator().manual_seed(6)).to(
        logits.dtype
    )
    (logits * cotangent).sum().backward()
    return logits.detach(), embeddings.grad


def _base(name):
    return classifier_base(name) if name == "bert" else causal_base(name)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "bert"])
@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
def test_one_expert_gives_the_logits_and_gradients_of_peft(name, rslora, dtype):
    model = into(
        _base(name).to(dtype),
        num_experts=1,
        num_experts_per_tok=1,
        r=4,
        lora_alpha=6,
        use_rslora=rslora,
    )
    twin = _twin(_base(name).to(dtype), model, {0: 1.0})
    ours, theirs = _backward(model), _backward(twin)
    gradients = factors(model, 0, of=lambda weight: weight.grad)
    for got, expected in zip(ours, theirs):
        _assert_near(got, expected)
    for linear, (a, b) in gradients.items():
        layer = twin.base_model.model.get_submodule(linear)
        _assert_near(a, layer.lora_A["a0"].weight.grad)
        _assert_near(b, layer.lora_B["a0"].weight.grad)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("expert", [0, 1, 2])
def test_a_forced_expert_is_its_peft_adapter(expert, level):
    model = into(causal_base(), **MIXED_RANKS, routing_level=level)
    with model.use_experts(MIXED_RANKS["expert_names"][expert]), torch.no_grad():
        logits = model(tokens()).logits
    expected = _twin(causal_base(), model, {expert: 1.0})(tokens()).logits
    _assert_near(logits, expected)
    assert not torch.allclose(model(tokens()).logits, expected, atol=1e-3), (
        "outside, the router chooses again"
    )


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "bert"])
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
def test_a_weighted_pair_is_the_base_plus_both_adapters(name, scope):
    model = into(_base(name), **MIXED_RANKS, router_scope=scope)
    with model.use_experts({"law": 0.7, "math": 0.3}), torch.no_grad():
        logits = model(tokens()).logits
    expected = _twin(_base(name), model, {2: 0.7, 0: 0.3})(tokens()).logits
    _assert_near(logits, expected)


def test_forced_experts_generate_and_the_router_takes_over_again_after_an_error():
    model = into(causal_base(), **MIXED_RANKS)
    twin = _twin(causal_base(), model, {1: 1.0, 0: 1.0})
    settings = {"max_new_tokens": 5, "do_sample": False}
    free = model(tokens()).logits
    with pytest.raises(KeyError), model.use_experts(["code", "math"]):
        with model.use_experts("law"):
            pass
        assert torch.equal(
            model.generate(tokens(), **settings), twin.generate(input_ids=tokens(), **settings)
        )
        raise KeyError
    assert torch.equal(model(tokens()).logits, free)
    with pytest.raises(ValueError, match="math, code, law"), model.use_experts("maths"):
        pass
