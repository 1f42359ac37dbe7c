"""generate() with a mixture inside: the cache, padding, and every way of decoding, at both
levels.
"""

from __future__ import annotations

import copy

import pytest
import torch
from bases import CAUSAL, causal_base
from core.decoding import CLOSE, GREEDY, NEW, WITH_LOGITS
from core.mixtures import ALL_CAUSAL, LEVELS, SCOPES, causal, into, left_padded, prompt_mask, tokens
from moelora_kernels import inference

from moelora.core.forward_pass import running_pass
from moelora.core.prompts import ON_CACHE, PLANS

PROMPT = 7


def _prompt_end(model, sequences):
    """What tells a full forward of generated sequences where their prompt ended."""
    if model.moelora_config.routing_level == "token":
        return {}
    return {"router_mask": prompt_mask(sequences, PROMPT)}


@torch.no_grad()
def _one_forward(model, sequences):
    """The logits that chose each new token, from one forward over the whole sequences."""
    return model(sequences, **_prompt_end(model, sequences)).logits[:, PROMPT - 1 : -1]


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("name", ALL_CAUSAL)
def test_generation_equals_one_forward_with_and_without_cache(name, level):
    model = causal(name, routing_level=level)
    cached = model.generate(tokens(2, PROMPT), **GREEDY, **WITH_LOGITS)
    expected = _one_forward(model, cached.sequences)
    torch.testing.assert_close(torch.stack(cached.logits, 1), expected, **CLOSE)
    uncached = model.generate(tokens(2, PROMPT), use_cache=False, **GREEDY, **WITH_LOGITS)
    assert torch.equal(uncached.sequences, cached.sequences)
    torch.testing.assert_close(torch.stack(uncached.logits, 1), expected, **CLOSE)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("name", ALL_CAUSAL)
def test_left_padded_batches_equal_single_rows(name, level):
    model = causal(name, routing_level=level)
    rows = [tokens(1, PROMPT)[0], tokens(1, PROMPT - 3, seed=4)[0]]
    batch = model.generate(**left_padded(rows), **GREEDY, **WITH_LOGITS)
    for i, row in enumerate(rows):
        alone = model.generate(**left_padded([row]), **GREEDY, **WITH_LOGITS)
        assert torch.equal(batch.sequences[i, PROMPT:], alone.sequences[0, len(row) :])
        torch.testing.assert_close(
            torch.stack(batch.logits, 1)[i], torch.stack(alone.logits, 1)[0], **CLOSE
        )


@torch.no_grad()
def _step_by_step(model, ids):
    """Logits from the prompt's forward and then one token at a time, as a hand-written loop does
    it.
    """
    outputs = model(ids[:, :PROMPT], use_cache=True)
    routing = getattr(outputs, "expert_routing", None)
    logits = [outputs.logits[:, -1]]
    for t in range(PROMPT, ids.shape[1] - 1):
        cache = {k: outputs[k] for k in ("past_key_values", "cache_params") if k in outputs}
        outputs = model(ids[:, t : t + 1], use_cache=True, expert_routing=routing, **cache)
        logits.append(outputs.logits[:, -1])
    return torch.stack(logits, 1)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize(
    "name,scope", [(n, "site") for n in CAUSAL] + [("llama", s) for s in SCOPES]
)
def test_token_by_token_with_the_cache_equals_one_forward(name, scope, level):
    model = causal(name, router_scope=scope, routing_level=level)
    ids = tokens(2, PROMPT + NEW)
    torch.testing.assert_close(_step_by_step(model, ids), _one_forward(model, ids), **CLOSE)


DECODING = {
    "greedy": GREEDY,
    "beams": {**GREEDY, "num_beams": 3},
    "beams, several a prompt": {**GREEDY, "num_beams": 3, "num_return_sequences": 2},
    "sampling": {**GREEDY, "do_sample": True},
    "sampling, several a prompt": {**GREEDY, "do_sample": True, "num_return_sequences": 3},
    "beam sampling": {**GREEDY, "do_sample": True, "num_beams": 2},
}


def _generate(model, seed=0, **settings):
    torch.manual_seed(seed)
    return model.generate(**settings)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("way", DECODING)
def test_every_way_of_decoding_is_the_same_without_cache_and_from_embeddings(way, name, level):
    model = causal(name, routing_level=level)
    inputs = left_padded([tokens(1, PROMPT)[0], tokens(1, 4, seed=4)[0]])
    settings = DECODING[way]
    expected = _generate(model, **inputs, **settings)
    assert torch.equal(_generate(model, **inputs, **settings), expected), "one seed, one result"
    assert torch.equal(_generate(model, **inputs, use_cache=False, **settings), expected)
    embedded = {"inputs_embeds": model.get_input_embeddings()(inputs.pop("input_ids")), **inputs}
    assert torch.equal(_generate(model, **embedded, **settings), expected[:, PROMPT:])


@pytest.mark.parametrize("level", LEVELS)
def test_each_sampled_sequence_keeps_its_own_prompt_s_routing(level):
    model = causal(routing_level=level)
    settings = {**DECODING["sampling, several a prompt"], **WITH_LOGITS}
    sampled = _generate(model, input_ids=tokens(2, PROMPT), **settings)
    assert len({tuple(row) for row in sampled.sequences.tolist()}) == 6
    expected = _one_forward(model, sampled.sequences)
    torch.testing.assert_close(torch.stack(sampled.logits, 1), expected, **CLOSE)


@pytest.mark.parametrize("level", LEVELS)
def test_a_beam_s_score_is_that_of_one_forward(level):
    model = causal(routing_level=level)
    settings = {
        **DECODING["beams, several a prompt"],
        "return_dict_in_generate": True,
        "output_scores": True,
    }
    beams = model.generate(tokens(2, PROMPT), **settings)
    logits = _one_forward(model, beams.sequences).log_softmax(-1)
    each = logits.gather(2, beams.sequences[:, PROMPT:, None]).squeeze(2)
    torch.testing.assert_close(beams.sequences_scores, each.mean(1), **CLOSE)


ASSISTANTS = {
    "a plain model": lambda: causal_base(seed=1),
    "a token-level mixture": lambda: into(causal_base(seed=1)),
    "a sequence-level mixture": lambda: into(causal_base(seed=1), routing_level="sequence"),
    "itself, once more": lambda: causal(routing_level="sequence"),
    "the prompt": lambda: None,
}


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("assistant", ASSISTANTS)
@pytest.mark.parametrize("padded", [False, True])
def test_assisted_generation_is_the_unassisted_one(assistant, level, padded):
    model = causal(routing_level=level)
    helper = ASSISTANTS[assistant]()
    help_ = {"prompt_lookup_num_tokens": 2} if helper is None else {"assistant_model": helper}
    # Repeated, so that a look-up in the prompt finds something.
    row = torch.cat([tokens(1, 4)[0], tokens(1, 4)[0]])
    inputs = left_padded([row])
    if padded:
        inputs = {"input_ids": torch.cat([torch.zeros(1, 2, dtype=torch.long), row[None]], 1)}
        inputs["attention_mask"] = (inputs["input_ids"] != 0).long()
    settings = {**GREEDY, "max_new_tokens": 9, "min_new_tokens": 9}
    calls = []
    model.register_forward_hook(
        lambda m, a, k, out: calls.append(out.logits.shape[1]), with_kwargs=True
    )
    expected = model.generate(**inputs, **settings)
    plain_calls = len(calls)
    assert torch.equal(model.generate(**inputs, **help_, **settings), expected)
    assert max(calls[plain_calls + 1 :]) > 1, "several candidates were checked at once"


def test_an_assistant_that_is_the_same_model_is_always_right():
    model, twin = causal(routing_level="sequence"), causal(routing_level="sequence")
    calls = []
    model.register_forward_hook(lambda m, a, out: calls.append(1))
    settings = {**GREEDY, "max_new_tokens": 12, "min_new_tokens": 12, "assistant_model": twin}
    twin.generation_config.update(num_assistant_tokens=3, assistant_confidence_threshold=0.0)
    model.generate(tokens(1, PROMPT), **settings)
    assert len(calls) == 3, "three candidates and one token more a call"


@pytest.mark.parametrize("scope", SCOPES)
def test_a_plain_model_takes_a_sequence_level_mixture_as_assistant(scope):
    base, settings = causal_base("llama", seed=1), GREEDY
    expected = base.generate(tokens(1, PROMPT), **settings)
    helper = causal(router_scope=scope, routing_level="token")
    assert torch.equal(
        base.generate(tokens(1, PROMPT), assistant_model=helper, **settings), expected
    )


@pytest.mark.parametrize("scope", SCOPES)
def test_a_sequence_levels_mixture_assists_a_plain_model(scope):
    base = causal_base("llama", seed=1)
    expected = base.generate(tokens(1, PROMPT), **GREEDY)
    helper = causal(router_scope=scope, routing_level="sequence")
    seen = []
    route = type(helper).forward

    def spy(self, *args, **kwargs):
        outputs = route(self, *args, **kwargs)
        seen.append(outputs.expert_routing[0].expert_ids)
        return outputs

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(helper), "forward", spy)
        got = base.generate(tokens(1, PROMPT), assistant_model=helper, **GREEDY)
    assert torch.equal(got, expected)
    assert len(seen) > 1 and all(torch.equal(ids, seen[0]) for ids in seen), "the prompt's, kept"


@pytest.mark.parametrize("level", LEVELS)
def test_guidance(level):
    """The unconditional prompt is a prompt of its own, with its own routing and cache."""
    model = causal(routing_level=level)
    ids = tokens(1, PROMPT)
    negative = tokens(1, 4, seed=12)
    got = model.generate(ids, guidance_scale=1.5, negative_prompt_ids=negative, **GREEDY)
    expected = ids
    for _ in range(got.shape[1] - ids.shape[1]):
        new = expected[:, ids.shape[1] :]
        rows = (expected, torch.cat([negative, new], dim=1))
        masks = [None, None]
        if level == "sequence":
            masks = [torch.arange(row.shape[1])[None] < n for row, n in zip(rows, (PROMPT, 4))]
        with torch.no_grad():
            both = [
                model(row, router_mask=mask).logits[:, -1].log_softmax(-1)
                for row, mask in zip(rows, masks)
            ]
        guided = 1.5 * (both[0] - both[1]) + both[1]
        expected = torch.cat([expected, guided.argmax(-1, keepdim=True)], dim=1)
    assert torch.equal(got, expected)


def test_generations_of_different_sizes_leave_nothing_behind():
    model = causal(routing_level="sequence")
    big, small = tokens(4, PROMPT, seed=8), tokens(1, 5, seed=9)
    expected = [causal(routing_level="sequence").generate(ids, **GREEDY) for ids in (big, small)]
    for _ in range(2):
        assert torch.equal(model.generate(big, **GREEDY), expected[0])
        model.eval()(tokens(3, 6))
        assert torch.equal(model.generate(small, **GREEDY), expected[1])
    assert running_pass(model.moelora) is None


def test_a_forward_that_breaks_off_leaves_nothing_behind():
    model = causal()
    expected = model(tokens()).logits
    keys = model.model.layers[0].self_attn.k_proj

    def stop(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        handle = keys.register_forward_pre_hook(stop)
        model(tokens())
    handle.remove()
    assert running_pass(model.moelora) is None
    assert torch.equal(model(tokens()).logits, expected)


def test_a_loop_can_carry_two_generations_by_turns():
    model = causal(routing_level="sequence")
    a, b = tokens(2, PROMPT + NEW, seed=8), tokens(3, PROMPT + NEW, seed=9)
    first = {name: model(ids[:, :PROMPT], use_cache=True) for name, ids in (("a", a), ("b", b))}
    for name, ids in (("a", a), ("b", b)):
        step = model(
            ids[:, PROMPT : PROMPT + 1],
            past_key_values=first[name].past_key_values,
            expert_routing=first[name].expert_routing,
        )
        torch.testing.assert_close(step.logits[:, 0], _one_forward(model, ids)[:, 1], **CLOSE)


def test_a_given_routing_is_kept_while_generating():
    model = causal(routing_level="sequence")
    ids, other = tokens(2, PROMPT), tokens(2, PROMPT, seed=9)
    routing = model(other).expert_routing
    for settings in (GREEDY, DECODING["beams"]):
        given = model.generate(ids, expert_routing=routing, **settings)
        assert not torch.equal(given, model.generate(ids, **settings))
        assert torch.equal(
            given, model.generate(ids, expert_routing=routing, use_cache=False, **settings)
        )


def test_a_router_mask_says_which_part_of_the_input_is_the_prompt():
    model = causal(routing_level="sequence")
    ids = tokens(2, PROMPT + 3)
    routing = model(ids[:, :PROMPT]).expert_routing
    expected = model.generate(ids, expert_routing=routing, **GREEDY)
    assert torch.equal(
        model.generate(ids, router_mask=prompt_mask(ids, PROMPT), **GREEDY), expected
    )


def test_a_prompt_in_chunks_is_refused_at_sequence_level_alone():
    settings = {**GREEDY, "prefill_chunk_size": 3}
    with pytest.raises(ValueError, match="prefill_chunk_size"):
        causal(routing_level="sequence").generate(tokens(2, PROMPT), **settings)
    model = causal()
    chunked = model.generate(tokens(2, PROMPT), **settings)
    assert torch.equal(chunked, model.generate(tokens(2, PROMPT), **GREEDY))


def test_going_on_with_a_cache_takes_the_prompt_s_routing():
    model = causal(routing_level="sequence")
    ids = tokens(2, PROMPT + 2)
    first, second = (model(ids[:, :PROMPT], use_cache=True) for _ in range(2))
    carried = model.generate(ids, past_key_values=second.past_key_values, **GREEDY)
    went_on = model.generate(
        ids, past_key_values=first.past_key_values, expert_routing=first.expert_routing, **GREEDY
    )
    assert torch.equal(went_on, model.generate(ids, router_mask=prompt_mask(ids, PROMPT), **GREEDY))
    assert torch.equal(carried, went_on), "the cache carries its prompt's routing"


@pytest.mark.parametrize("scope", SCOPES)
def test_a_request_gathers_its_experts_once(scope, monkeypatch):
    """Sequence level, one row: not at every token; and what changes meanwhile is seen."""
    model = causal(routing_level="sequence", router_scope=scope)
    expected = model.generate(tokens(1, PROMPT), use_cache=False, **GREEDY, **WITH_LOGITS)
    gathered = []
    gather = inference._gather
    monkeypatch.setattr(inference, "_gather", lambda f, *a: gathered.append(f) or gather(f, *a))
    got = model.generate(tokens(1, PROMPT), **GREEDY, **WITH_LOGITS)
    torch.testing.assert_close(torch.stack(got.logits, 1), torch.stack(expected.logits, 1), **CLOSE)
    factors = [f for site in model.moelora.sites.values() for f in site.factors()]
    assert len(gathered) == len({id(f) for f in gathered}) == len(set(factors))
    cache = got.past_key_values
    assert getattr(cache, PLANS) and not getattr(copy.deepcopy(cache), PLANS)
    with torch.no_grad():
        for factor in factors:
            factor.weight.mul_(2)
        step = model(got.sequences[:, -1:], past_key_values=copy.deepcopy(cache)).logits
        assert torch.equal(model(got.sequences[:, -1:], past_key_values=cache).logits, step)


def test_plans_of_a_request_are_not_those_of_the_next():
    model = causal(routing_level="sequence")
    first = model.generate(tokens(1, PROMPT), **GREEDY, **WITH_LOGITS).past_key_values
    second = model.generate(tokens(1, PROMPT, seed=9), **GREEDY, **WITH_LOGITS).past_key_values
    assert getattr(first, PLANS) is not getattr(second, PLANS)
    with torch.no_grad():
        routing = getattr(second, ON_CACHE)
        token = tokens(1, 1)
        fresh = model(token, past_key_values=copy.deepcopy(first), expert_routing=routing).logits
        assert torch.equal(
            model(token, past_key_values=first, expert_routing=routing).logits, fresh
        )


@pytest.mark.parametrize("fields", [{"routing_level": "sequence"}, {"router": "hybrid"}])
def test_an_adapted_head_is_routed_by_the_whole_prompt(fields):
    """`generate()` asks for the last token's logits alone, so the head's router read no more."""
    model = causal(target_modules=["v_proj", "lm_head"], **fields)
    ids = tokens()
    expected = model(ids).logits[:, -1]
    with pytest.raises(ValueError, match=r"reads 1 of the \d+ tokens.*logits_to_keep=0"):
        model(ids, logits_to_keep=1)
    made = model.generate(
        ids, max_new_tokens=3, do_sample=False, output_logits=True, return_dict_in_generate=True
    )
    assert torch.allclose(made.logits[0], expected, atol=1e-6)
    without_cache = model.generate(ids, max_new_tokens=3, do_sample=False, use_cache=False)
    assert torch.equal(made.sequences, without_cache)


def test_the_routing_of_single_tokens_is_refused_by_generate():
    """With beams its rows were repeated in another order than the tokens'."""
    model = causal()
    ids = tokens()
    routing = model(ids, output_expert_routing=True).expert_routing
    with pytest.raises(ValueError, match=r"of single tokens.*expert_weights"):
        model.generate(ids, expert_routing=routing, max_new_tokens=1, num_beams=2)
