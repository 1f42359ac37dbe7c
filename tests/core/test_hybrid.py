"""The blend of token and sequence routing: its formula, and that the prompt's part depends on the
prompt alone and is kept while generating.
"""

from __future__ import annotations

import copy

import pytest
import torch
from bases import causal_base
from core.decoding import CLOSE, GREEDY, NEW, WITH_LOGITS
from core.mixtures import (
    NO_ROUTER_LOSS,
    SCOPES,
    causal,
    classifier,
    into,
    left_padded,
    prompt_mask,
    tokens,
)

from moelora import MoeLoraConfig, MoeLoraForCausalLM
from moelora.core.prompts import ON_CACHE
from moelora.routers import HybridRouter, PromptScores

PROMPT, LENGTH, CHANGED = 7, 12, 8
FAR = 1e-3


def model_of(name: str = "llama", **fields):
    # Most of it the prompt's, so that a wrong prompt shows.
    options = {"alpha": 0.8} | fields.pop("options", {})
    return causal(name, router="hybrid", router_options=options, **fields)


def made(depth: float = 0.0, **options):
    torch.manual_seed(0)
    config = MoeLoraConfig(num_experts=5, router="hybrid", router_options=options)
    router = HybridRouter(config, 6).double()
    router.depth = depth
    return router


def test_it_blends_the_gates_of_the_token_and_of_its_prompt():
    """HMoRA's formula in float64, with every gradient."""
    router = made(alpha=0.3)
    torch.nn.init.constant_(router.alpha_shift, 0.4)
    x = torch.randn(2, 4, 6, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[False, True, True, False], [True, True, True, True]])
    weights = torch.randn(8, 2, dtype=torch.float64)
    routing = router(x, prompt_mask=mask)
    parameters = [x, *router.parameters()]
    got = torch.autograd.grad((routing.expert_weights * weights).sum(), parameters)
    means = torch.stack([x[0, 1:3].mean(0), x[1].mean(0)])
    alpha = 1 / (1 + (0.7 / 0.3) * (-router.alpha_shift).exp())
    of_prompt = (means @ router.prompt_weight.T).softmax(-1)
    p = alpha * of_prompt[:, None] + (1 - alpha) * (x @ router.weight.T).softmax(-1)
    p = p.reshape(8, 5)
    kept = p.topk(2).indices
    expected = p.gather(1, kept) / p.gather(1, kept).sum(1, keepdim=True)
    assert torch.equal(routing.expert_ids, kept)
    torch.testing.assert_close(routing.expert_weights, expected)
    torch.testing.assert_close(routing.logits.exp(), p)
    for one, two in zip(got, torch.autograd.grad((expected * weights).sum(), parameters)):
        torch.testing.assert_close(one, two)


def test_what_was_made_of_prompts_is_used_again():
    router = made()
    x = torch.randn(2, 4, 6, dtype=torch.float64)
    prompt = PromptScores(prompt_mask(x[..., 0], 3))
    whole = router(x, prompt=prompt)
    later = router(x[:, 3:], prompt=PromptScores(logits=prompt.logits))
    torch.testing.assert_close(later.logits, whole.logits.view(2, 4, 5)[:, 3])
    single = router(x[:, 0])
    torch.testing.assert_close(single.logits, router(x[:, :1]).logits)


@pytest.mark.parametrize("learn", [True, False])
def test_the_prompt_s_share_grows_with_depth(learn):
    layers = 5
    model = into(
        causal_base(num_hidden_layers=layers),
        router="hybrid",
        router_scope="layer",
        router_options={"alpha": [0.1, 0.9], "learn_alpha": learn},
    )
    odds = [
        float(torch.as_tensor(router.log_odds()).detach()) for router in model.moelora.router_list
    ]
    # HMoRA's spacing: even in log-odds.
    expected = torch.linspace(-1, 1, layers) * torch.tensor(9.0).log()
    torch.testing.assert_close(torch.tensor(odds), expected)
    names = {name for name, _ in model.moelora.router_list[0].named_parameters()}
    assert names == {"weight", "prompt_weight"} | ({"alpha_shift"} if learn else set())


def _pair(position: int = CHANGED):
    """Two rows that differ in the token at `position` alone."""
    ids = tokens(1, LENGTH).repeat(2, 1)
    ids[1, position] = (ids[0, position] + 7) % 60 + 3
    return ids


WAYS = {
    "router_mask": lambda ids: {"router_mask": prompt_mask(ids, 4)},
    "labels": lambda ids: {"labels": ids.masked_fill(prompt_mask(ids, 4), -100)},
    "labels everywhere": lambda ids: {"labels": ids.clone()},
}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["llama", "bloom", "mamba"])
@torch.no_grad()
def test_no_logit_after_the_prompt_depends_on_a_later_token(name, way, training):
    model = model_of(name, router_prefix_tokens=4).train(training)
    ids = _pair()
    logits = model(ids, **WAYS[way](ids)).logits
    difference = (logits[0] - logits[1]).abs().amax(-1)
    assert difference[:CHANGED].max() < 2e-6 and difference[CHANGED:].min() > FAR
    for position in range(4):
        ids = _pair(position)
        outputs = model(ids, **WAYS[way](ids), output_expert_routing=True)
        for routing in outputs.expert_routing:
            by_row = routing.logits.view(2, LENGTH, -1)
            # Of tokens that agree, which stand after the prompt: it is the prompt that differs.
            assert (by_row[0, 5:] - by_row[1, 5:]).abs().amax(-1).min() > 1e-5


def test_labels_inside_a_prefix_prompt_take_no_loss_and_training_without_a_prompt_is_refused():
    model = model_of(router_prefix_tokens=4).train()
    ids = tokens(2, LENGTH)
    outputs = model(ids, labels=ids)
    counted = ids.masked_fill(prompt_mask(ids, 4), -100)
    expected = torch.nn.functional.cross_entropy(
        outputs.logits[:, :-1].flatten(0, 1), counted[:, 1:].flatten()
    )
    torch.testing.assert_close(outputs.loss, expected)
    with pytest.raises(ValueError, match="pass router_mask"):
        model(ids)
    with pytest.raises(ValueError, match="packed"):
        model(ids, labels=ids, position_ids=torch.arange(6).repeat(2, 2))


@torch.no_grad()
def _one_forward(model, sequences):
    """The logits that chose each new token, from one forward over the whole sequences."""
    mask = prompt_mask(sequences, PROMPT)
    return model(sequences, router_mask=mask).logits[:, PROMPT - 1 : -1]


@pytest.mark.parametrize(
    "name,scope", [(n, "site") for n in ("gpt2", "mamba", "bloom")] + [("llama", s) for s in SCOPES]
)
def test_generation_equals_one_forward_with_and_without_cache(name, scope):
    model = model_of(name, router_scope=scope)
    cached = model.generate(tokens(2, PROMPT), **GREEDY, **WITH_LOGITS)
    expected = _one_forward(model, cached.sequences)
    torch.testing.assert_close(torch.stack(cached.logits, 1), expected, **CLOSE)
    uncached = model.generate(tokens(2, PROMPT), use_cache=False, **GREEDY, **WITH_LOGITS)
    assert torch.equal(uncached.sequences, cached.sequences)
    torch.testing.assert_close(torch.stack(uncached.logits, 1), expected, **CLOSE)


@torch.no_grad()
def test_token_by_token_with_a_cache_that_is_handed_on_alone_equals_one_forward():
    model = model_of()
    ids = tokens(2, PROMPT + NEW)
    outputs = model(ids[:, :PROMPT], use_cache=True)
    assert outputs.get("expert_routing") is None
    logits = [outputs.logits[:, -1]]
    for t in range(PROMPT, ids.shape[1] - 1):
        cache = outputs.past_key_values
        assert len(getattr(cache, ON_CACHE)) == len(model.moelora.router_list)
        outputs = model(ids[:, t : t + 1], past_key_values=cache, use_cache=True)
        logits.append(outputs.logits[:, -1])
    torch.testing.assert_close(torch.stack(logits, 1), _one_forward(model, ids), **CLOSE)


DECODING = {
    "greedy": GREEDY,
    "beams": {**GREEDY, "num_beams": 3, "num_return_sequences": 2},
    "sampling": {**GREEDY, "do_sample": True, "num_return_sequences": 3},
}


@pytest.mark.parametrize("way", DECODING)
def test_every_way_of_decoding_is_the_same_without_cache_padding_and_from_embeddings(way):
    model = model_of()
    rows = [tokens(1, PROMPT)[0], tokens(1, 4, seed=4)[0]]
    inputs = left_padded(rows)

    def run(**given):
        torch.manual_seed(0)
        return model.generate(**given, **DECODING[way])

    expected = run(**inputs)
    assert torch.equal(run(**inputs, use_cache=False), expected)
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    embedded = run(inputs_embeds=embeds, attention_mask=inputs["attention_mask"])
    assert torch.equal(embedded, expected[:, PROMPT:])
    if way != "sampling":
        each = len(expected) // 2
        for i, row in enumerate(rows):
            alone = run(input_ids=row[None])
            assert torch.equal(expected[i * each : (i + 1) * each, PROMPT:], alone[:, len(row) :])


@pytest.mark.parametrize("assistant", ["plain", "blending", "itself"])
def test_assisted_generation_is_the_unassisted_one(assistant):
    model = model_of()
    row = torch.cat([tokens(1, 4), tokens(1, 4)], 1)
    expected = model.generate(row, **GREEDY)
    more = {}
    if assistant == "itself":
        model.generation_config.assistant_early_exit = 1
    else:
        helper = causal_base(seed=1)
        more = {
            "assistant_model": helper if assistant == "plain" else into(helper, router="hybrid")
        }
    assert torch.equal(model.generate(row, **more, **GREEDY), expected)


@torch.no_grad()
def test_a_prompt_that_is_not_known_is_refused():
    model = model_of()
    ids = tokens(2, PROMPT)
    unknown = causal_base()(ids, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="with a filled cache needs the prompt's routing"):
        model(tokens(2, 1), past_key_values=unknown)
    with pytest.raises(ValueError, match="prefill_chunk_size"):
        model.generate(ids, prefill_chunk_size=3, **GREEDY)
    with pytest.raises(RuntimeError, match="call the model itself"):
        model.model.layers[0].self_attn.q_proj(torch.ones(1, 3, 32))
    with pytest.raises(ValueError, match="router_mask marks no attended token in row 1"):
        model(ids, router_mask=torch.tensor([[1] * PROMPT, [0] * PROMPT]))


@torch.no_grad()
def test_forced_experts_bans_and_given_routings():
    model, ids = model_of(), tokens(2, PROMPT)
    with model.use_experts("expert_1"):
        forced = model(ids).logits
    weights = torch.tensor([0.0, 1.0, 0.0, 0.0])
    torch.testing.assert_close(model(ids, expert_weights=weights).logits, forced)
    given = model.generate(ids, expert_weights=weights, **GREEDY)
    with model.use_experts("expert_1"):
        assert torch.equal(model.generate(ids, **GREEDY), given)
    outputs = model(ids, banned_experts=["expert_2"], output_expert_routing=True)
    assert not any((routing.expert_ids == 2).any() for routing in outputs.expert_routing)
    assert outputs.expert_routing[0].expert_ids.shape == (2 * PROMPT, 2)
    again = model(ids, expert_routing=outputs.expert_routing)
    torch.testing.assert_close(again.logits, outputs.logits)
    banned = model.generate(ids, banned_experts=["expert_2"], **GREEDY)
    assert torch.equal(
        banned, model.generate(ids, banned_experts=["expert_2"], use_cache=False, **GREEDY)
    )


@pytest.mark.parametrize("kind", [True, False], ids=["reentrant", "non_reentrant"])
@pytest.mark.parametrize("scope", SCOPES)
def test_checkpointing_has_the_gradients_of_none(scope, kind):
    ids = tokens()
    labels = ids.masked_fill(prompt_mask(ids, 4), -100)
    targets = torch.tensor([0, 1])
    found = []
    for checkpointing in (False, True):
        model = model_of(router_scope=scope, router_jitter_noise=0.1).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": kind})
        torch.manual_seed(0)
        model(ids, labels=labels, expert_targets=targets).loss.backward()
        found.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    assert all(bool(g.any()) for g in found[0].values())
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("pooling", ["last", "attention"])
def test_the_prompt_is_pooled_as_the_configuration_says(pooling):
    model = model_of(router_pooling=pooling, **NO_ROUTER_LOSS).train()
    ids = tokens()
    model(ids, labels=ids.masked_fill(prompt_mask(ids, 4), -100)).loss.backward()
    for name, parameter in model.moelora.routers.named_parameters():
        assert bool(parameter.grad.any()), name


def test_a_classifier_reads_its_whole_input():
    model = classifier("llama", router="hybrid")
    row = tokens(1, 6)
    padded = {
        "input_ids": torch.nn.functional.pad(row, (0, 3)),
        "attention_mask": torch.nn.functional.pad(torch.ones_like(row), (0, 3)),
    }
    alone = model(row, attention_mask=torch.ones_like(row))
    torch.testing.assert_close(model(**padded).logits, alone.logits, rtol=1e-5, atol=1e-6)


def test_a_checkpoint_keeps_learned_shares_and_depths(tmp_path):
    model = model_of(options={"alpha": [0.2, 0.7]})
    with torch.no_grad():
        for router in model.moelora.router_list:
            router.alpha_shift.normal_()
    logits = model(tokens()).logits
    assert torch.equal(copy.deepcopy(model)(tokens()).logits, logits)
    model.save_pretrained(tmp_path)
    again = MoeLoraForCausalLM.from_pretrained(tmp_path, base=causal_base()).eval()
    assert torch.equal(again(tokens()).logits, logits)


def test_impossible_settings_are_refused():
    with pytest.raises(ValueError, match="blends the routing of tokens and of sequences already"):
        MoeLoraConfig(router="hybrid", routing_level="sequence")
    for wrong in (0.0, 1, [0.0, 0.5], [0.5, 1.2]):
        with pytest.raises(ValueError, match="alpha.*out of range"):
            MoeLoraConfig(router="hybrid", router_options={"alpha": wrong})
    with pytest.raises(ValueError, match="lists 3 numbers"):
        MoeLoraConfig(router="hybrid", router_options={"alpha": [0.1, 0.2, 0.3]})
