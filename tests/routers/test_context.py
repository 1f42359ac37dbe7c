"""A router that is told from outside: what it computes, and how its vector travels."""

from __future__ import annotations

import copy

import pytest
import torch
from bases import causal_base
from core.decoding import CLOSE, GREEDY, guided_by_hand
from core.mixtures import (
    LEVELS,
    NO_ROUTER_LOSS,
    SCOPES,
    causal,
    classifier,
    into,
    left_padded,
    prompt_mask,
    tokens,
    told,
)
from training.runs import batch, rows_of, trainer

from moelora import MoeLoraConfig, MoeLoraForCausalLM, PadRouting
from moelora.routers import ContextRouter

WIDTH = 6


def made(**options):
    torch.manual_seed(0)
    config = MoeLoraConfig(num_experts=5, router="context", router_options=options)
    return ContextRouter(config, 99).double()


def model_of(**fields):
    options = {"context_size": WIDTH, "noise": False} | fields.pop("options", {})
    return causal(router="context", router_options=options, **fields)


def contexts(rows: int = 2, seed: int = 7):
    return torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("hidden", [0, 3])
def test_it_computes_noisy_top_k_of_the_context(hidden):
    """arXiv:1701.06538, eq. 3 to 5, in float64, with every gradient."""
    router = made(context_size=WIDTH, hidden_size=hidden).train()
    torch.nn.init.normal_(router.noise_weight)
    c = torch.randn(4, WIDTH, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(4, 2, dtype=torch.float64)
    torch.manual_seed(1)
    routing = router(c)
    parameters = [c, *router.parameters()]
    got = torch.autograd.grad((routing.expert_weights * weights).sum(), parameters)
    torch.manual_seed(1)
    noise = torch.randn(4, 5, dtype=torch.float64)
    inner = c
    if hidden:
        inner = torch.nn.functional.gelu(c @ router.hidden_weight.T + router.hidden_bias)
    noisy = inner @ router.weight.T + noise * (1 + (c @ router.noise_weight.T).exp()).log()
    kept = noisy.topk(2).indices
    expected = noisy.gather(1, kept).exp()
    expected = expected / expected.sum(1, keepdim=True)
    assert torch.equal(routing.expert_ids, kept)
    torch.testing.assert_close(routing.expert_weights, expected)
    for one, two in zip(got, torch.autograd.grad((expected * weights).sum(), parameters)):
        torch.testing.assert_close(one, two)
    plain = router.eval()(c)
    torch.testing.assert_close(plain.logits, inner @ router.weight.T)
    assert torch.equal(plain.logits, router(c).logits), "no noise but in training"


def test_without_noise_nothing_is_drawn_and_nothing_learned_for_it():
    router = made(context_size=WIDTH, noise=False).train()
    c = torch.randn(4, WIDTH, dtype=torch.float64)
    assert torch.equal(router(c).logits, router(c).logits)
    assert [name for name, _ in router.named_parameters()] == ["weight"]
    router.resize([2, None, 0])
    assert router(c).logits.shape == (4, 3)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("scope", SCOPES)
@torch.no_grad()
def test_every_token_of_a_sequence_has_the_choice_of_its_context(scope, level):
    model = model_of(router_scope=scope, routing_level=level)
    ids, told_ = tokens(), contexts()
    outputs = model(ids, router_context=told_, output_expert_routing=True)
    for index, router in enumerate(model.moelora.router_list):
        routing = outputs.expert_routing[index]
        expected = router(told_)
        assert torch.equal(routing.expert_ids, expected.expert_ids)
        assert torch.equal(routing.expert_weights, expected.expert_weights)
    again = model(ids, expert_routing=outputs.expert_routing)
    assert torch.equal(again.logits, outputs.logits)
    report = model.route(input_ids=ids, router_context=told_)
    assert report.by_sequence.shape == (2, 4)
    if scope == "model":
        # The same choice for every linear: what forced weights do.
        routing = outputs.expert_routing[0]
        forced = torch.zeros(2, 4).scatter(1, routing.expert_ids, routing.expert_weights)
        other = model(ids, expert_weights=forced)
        torch.testing.assert_close(other.logits, outputs.logits)


@pytest.mark.parametrize("name", ["llama", "gpt2", "mamba"])
@pytest.mark.parametrize("level", LEVELS)
@torch.no_grad()
def test_generation_equals_one_forward_with_and_without_cache(name, level):
    fields = {"router": "context", "router_options": {"context_size": WIDTH}}
    model = into(causal_base(name), routing_level=level, **fields)
    settings = {**GREEDY, "return_dict_in_generate": True, "output_logits": True}
    given = contexts()
    cached = model.generate(tokens(2, 7), router_context=given, **settings)
    expected = model(cached.sequences, router_context=given).logits[:, 6:-1]
    torch.testing.assert_close(torch.stack(cached.logits, 1), expected, **CLOSE)
    plain = model.generate(tokens(2, 7), router_context=given, use_cache=False, **settings)
    assert torch.equal(plain.sequences, cached.sequences)
    other = model.generate(tokens(2, 7), router_context=-given, **GREEDY)
    assert not torch.equal(other, cached.sequences)


WAYS = {
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "samples": {"do_sample": True, "num_return_sequences": 3},
    "chunks": {"prefill_chunk_size": 3},
}


@pytest.mark.parametrize("way", WAYS)
def test_each_row_keeps_its_context_in_every_way_of_decoding(way):
    model = model_of()
    rows = [tokens(1, 7)[0], tokens(1, 4, seed=4)[0]]
    given = contexts()
    found = []
    for cache in (True, False):
        if way == "chunks" and not cache:
            continue
        torch.manual_seed(0)
        settings = {**GREEDY, **WAYS[way], "use_cache": cache}
        found.append(model.generate(**left_padded(rows), router_context=given, **settings))
    assert all(torch.equal(found[0], other) for other in found)
    if way != "samples":
        each = len(found[0]) // 2
        for i, row in enumerate(rows):
            alone = model.generate(
                row[None], router_context=given[i : i + 1], **{**GREEDY, **WAYS[way]}
            )
            assert torch.equal(found[0][i * each : (i + 1) * each, 7:], alone[:, len(row) :])


@torch.no_grad()
def test_a_cache_carries_its_context_and_a_given_one_goes_first():
    model = model_of()
    ids, given = tokens(2, 9), contexts()
    expected = model(ids, router_context=given).logits
    cache = model(ids[:, :6], router_context=given, use_cache=True).past_key_values
    carried = model(ids[:, 6:], past_key_values=copy.deepcopy(cache)).logits
    torch.testing.assert_close(carried, expected[:, 6:], **CLOSE)
    other = model(ids[:, 6:], past_key_values=cache, router_context=-given).logits
    assert not torch.allclose(other, carried, atol=1e-3)


@pytest.mark.parametrize("assistant", ["plain", "told", "itself"])
def test_an_assistant_is_told_too_if_it_reads_it(assistant):
    model = model_of()
    if assistant == "itself":
        model.generation_config.assistant_early_exit = 1
        more = {}
    else:
        helper = causal_base(seed=1)
        if assistant == "told":
            options = {"context_size": WIDTH}
            helper = into(helper, router="context", router_options=options)
        more = {"assistant_model": helper}
    ids, given = tokens(1, 7), contexts(1)
    expected = model_of().generate(ids, router_context=given, **GREEDY)
    assert torch.equal(model.generate(ids, router_context=given, **more, **GREEDY), expected)


@pytest.mark.parametrize("kind", [True, False], ids=["reentrant", "non_reentrant"])
@pytest.mark.parametrize("scope", SCOPES)
def test_checkpointing_has_the_gradients_of_none_the_context_s_too(scope, kind):
    """Under noise, and with a context that a network outside has made."""
    ids = tokens()
    labels = ids.masked_fill(prompt_mask(ids, 4), -100)
    found = []
    for checkpointing in (False, True):
        model = model_of(router_scope=scope, options={"noise": True}).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": kind})
        torch.manual_seed(0)
        outside = torch.nn.Linear(3, WIDTH)
        given = outside(torch.ones(2, 3))
        model(ids, labels=labels, router_context=given).loss.backward()
        trained = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
        found.append({**trained, "outside": outside.weight.grad})
    assert all(bool(g.any()) for g in found[0].values())
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-5, atol=1e-6)


WRONG = {
    "missing": ({}, ValueError, r"reads router_context, which was not given.*\[batch, 6\]"),
    "too wide": ({"router_context": torch.ones(2, 7)}, ValueError, r"\(2, 7\).*\(2, 6\)"),
    "of one row": ({"router_context": torch.ones(1, 6)}, ValueError, r"\(1, 6\).*\(2, 6\)"),
    "a list": ({"router_context": [[0.0] * 6] * 2}, TypeError, "router_context is a list"),
    "complex": (
        {"router_context": torch.ones(2, 6, dtype=torch.complex64)},
        TypeError,
        "expected real numbers",
    ),
    "with a prompt": (
        {"router_context": torch.ones(2, 6), "router_mask": torch.ones(2, 10)},
        ValueError,
        "router_mask marks the prompt",
    ),
    "targets of tokens": (
        {"router_context": torch.ones(2, 6), "expert_targets": torch.zeros(2, 10).long()},
        ValueError,
        r"expert_targets has shape \(2, 10\)",
    ),
}


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("inputs,kind,message", WRONG.values(), ids=WRONG)
def test_wrong_contexts_are_refused_by_name(inputs, kind, message, level):
    model = model_of(routing_level=level)
    with pytest.raises(kind, match=message):
        model(tokens(), **inputs)
    with model.use_experts("expert_1"):
        model(tokens())


def test_other_routers_take_no_context_and_this_one_no_pooling():
    with pytest.raises(ValueError, match="read by router='context'.*'top_k': drop it"):
        causal()(tokens(), router_context=torch.ones(2, 6))
    with pytest.raises(ValueError, match="does nothing with router='context'"):
        MoeLoraConfig(router="context", routing_level="sequence", router_pooling="last")
    for wrong in ({"context_size": 0}, {"hidden_size": -1}):
        with pytest.raises(ValueError, match="too small"):
            MoeLoraConfig(router="context", router_options=wrong)


def test_a_classifier_reads_it_too():
    model = classifier(router="context", router_options={"context_size": WIDTH})
    one = model(tokens(), router_context=contexts()).logits
    assert not torch.allclose(model(tokens(), router_context=-contexts()).logits, one, atol=1e-4)


@pytest.mark.parametrize("collator", [None, PadRouting()], ids=["stock", "PadRouting"])
def test_the_trainer_hands_it_on_and_the_router_learns_what_it_says(collator, tmp_path):
    """Which of two experts a sequence should use stands in its context alone."""
    options = {"context_size": 2}
    model = causal(
        num_experts=2,
        num_experts_per_tok=1,
        router="context",
        router_scope="model",
        router_options=options,
        **NO_ROUTER_LOSS,
    )
    inputs = batch(8)
    which = torch.arange(8) % 2
    given = torch.nn.functional.one_hot(which, 2).float()
    data = rows_of({**inputs, "router_context": given, "expert_targets": which})
    settings = {"per_device_train_batch_size": 8, "max_steps": 60, "learning_rate": 0.05}
    more = {} if collator is None else {"data_collator": collator}
    trainer(model, data, tmp_path, **settings, **more).train()
    report = model.eval().route(input_ids=inputs["input_ids"], router_context=given)
    assert report.top_experts() == [f"expert_{e}" for e in which.tolist()]


def test_a_shape_aware_mixture_of_loras(tmp_path):
    """AmoebaLLM's (arXiv:2411.10606): one gate for the model, told which layers a sub-network has
    and how wide it is; noisy top 2 of 5.
    """
    layers, widths = 2, 3
    model = causal(
        num_experts=5,
        r=4,
        router="context",
        router_scope="model",
        router_options={"context_size": layers + widths, "hidden_size": 16},
    )
    whole = torch.tensor([[1.0, 1.0, 1.0, 0.0, 0.0]])
    small = torch.tensor([[1.0, 0.0, 0.0, 0.0, 1.0]])
    model.train()(tokens(1), labels=tokens(1), router_context=small).loss.backward()
    model.eval()
    assert all(bool(p.grad.any()) for p in model.moelora.routers.parameters())
    shares = [
        model.route(input_ids=tokens(1), router_context=own).by_sequence for own in (whole, small)
    ]
    assert not torch.equal(*shares), "another sub-network, other experts"
    logits = model(tokens(1), router_context=whole).logits
    model.save_pretrained(tmp_path)
    again = MoeLoraForCausalLM.from_pretrained(tmp_path, base=causal_base()).eval()
    assert torch.equal(again(tokens(1), router_context=whole).logits, logits)
    assert told(again, tokens(1))["router_context"].shape == (1, 5)


@pytest.mark.parametrize("level", LEVELS)
def test_guidance_tells_the_unconditional_pass_too(level):
    model = model_of(routing_level=level)
    given = contexts()
    told_ = {"router_context": given}
    expected = guided_by_hand(model, tokens(2, 7), tokens(2, 4, seed=12), told_)
    settings = {**GREEDY, "guidance_scale": 2.0, "negative_prompt_ids": tokens(2, 4, seed=12)}
    for cache in (True, False):
        got = model.generate(tokens(2, 7), **told_, **settings, use_cache=cache)
        assert torch.equal(got, expected)
    # Of each beam its own row; without a negative prompt it is the prompt's last token.
    beams = {**GREEDY, "guidance_scale": 2.0, "num_beams": 2}
    both = model.generate(tokens(2, 7), router_context=given, **beams)
    alone = model.generate(tokens(2, 7)[1:], router_context=given[1:], **beams)
    assert torch.equal(both[1:], alone)
