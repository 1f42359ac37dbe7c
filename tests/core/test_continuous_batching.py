"""`generate_batch` gives each request what `generate` gives it, or says that it cannot.

Its step lays the tokens of all requests into one row: prompts in chunks, new tokens beside them.
"""

from __future__ import annotations

import functools
import gc

import pytest
import torch
from bases import VOCAB, causal_base
from core.mixtures import ROUTERS_AT_LEVELS, SCOPES, causal, into, left_padded
from transformers import ContinuousBatchingConfig, GenerationConfig

from moelora import ROUTERS

LENGTHS = (1, 2, 3, 5, 7, 12, 20, 30)
NEW = 6
TOKEN_ROUTERS = [
    router
    for router in sorted(ROUTERS)
    if ROUTERS[router].reads != "context" and not ROUTERS[router].reads_prompt
]
REFUSED = [
    (router, level)
    for router, level in ROUTERS_AT_LEVELS
    if level == "sequence" or router not in TOKEN_ROUTERS
]


@pytest.fixture(scope="module", autouse=True)
def _collections_look_at_little():
    """A manager collects garbage twice when it ends, among all that the process ever imported."""
    gc.freeze()
    yield
    gc.unfreeze()


def _prompts():
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, VOCAB, (n,), generator=generator).tolist() for n in LENGTHS]


def _batched(model, **settings):
    """The new tokens of every prompt: three requests at a time, longer prompts in chunks."""
    wanted = GenerationConfig(
        max_new_tokens=NEW, do_sample=False, eos_token_id=-1, pad_token_id=0, **settings
    )
    slots = ContinuousBatchingConfig(
        max_requests_per_batch=3, max_batch_tokens=16, num_blocks=32, page_size=16
    )
    answers = model.generate_batch(
        _prompts(), generation_config=wanted, continuous_batching_config=slots
    )
    assert [answer.error for answer in answers.values()] == [None] * len(LENGTHS)
    return [answer.generated_tokens for answer in answers.values()]


def _generated(model):
    """The same by `generate`, of all prompts padded on the left."""
    rows = [torch.tensor(prompt) for prompt in _prompts()]
    settings = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False}
    batch = left_padded(rows)
    made = model.generate(**batch, **settings, eos_token_id=None, pad_token_id=0)
    return made[:, batch["input_ids"].shape[1] :].tolist()


@functools.cache
def _of_base(name):
    return _generated(causal_base(name))


def _check_equal_and_not_the_base(model, name="llama"):
    found = _batched(model)
    assert found == _generated(model)
    of_base = _of_base(name)
    assert sum(own != base for own, base in zip(found, of_base)) >= len(LENGTHS) // 2


@pytest.mark.parametrize("router", TOKEN_ROUTERS)
def test_routed_tokens_equal_generate(router):
    _check_equal_and_not_the_base(causal(router=router))


@pytest.mark.parametrize("scope", SCOPES)
def test_in_every_scope(scope):
    _check_equal_and_not_the_base(causal(router_scope=scope, null_expert=True))


def test_shared_and_missing_experts_and_an_adapted_head():
    fields = {"num_shared_experts": 1, "experts_per_layer": [2, 3], "num_experts_per_tok": 1}
    fields |= {"target_modules": ["q_proj", "down_proj", "lm_head"]}
    _check_equal_and_not_the_base(causal(**fields))


@pytest.mark.parametrize("name", ["qwen3", "mixtral"])
def test_other_bases_with_attention_that_must_be_exchanged(name):
    base = causal_base(name)
    base.set_attn_implementation("eager")
    model = into(base)
    _check_equal_and_not_the_base(model, name)
    assert model.config._attn_implementation == "eager"


@pytest.mark.parametrize("router,level", REFUSED)
def test_routers_that_read_more_than_a_token_are_refused(router, level):
    model = causal(router=router, routing_level=level)
    before = model.config._attn_implementation
    with pytest.raises(ValueError, match=r"call generate\(\)"):
        _batched(model)
    with pytest.raises(ValueError, match=r"routing_level='token'"):
        model.init_continuous_batching()
    manager = model.continuous_batching_context_manager()
    with pytest.raises(ValueError, match="Continuous batching"), manager:
        pass
    assert model.config._attn_implementation == before


def test_use_experts_is_refused_since_another_thread_computes():
    model = causal()
    names = model.moelora_config.expert_names
    for arguments in ({"experts": names[0]}, {"ban": names[:2]}):
        with model.use_experts(**arguments), pytest.raises(ValueError, match="a thread of its own"):
            _batched(model)
    assert _batched(model) == _generated(model)


def test_our_inputs_are_refused_as_they_would_not_arrive():
    model = causal()
    weights = torch.ones(4)
    targets = torch.zeros(1, dtype=torch.long)
    for name, value in {
        "expert_weights": weights,
        "banned_experts": [model.moelora_config.expert_names[0]],
        "expert_targets": targets,
        "output_expert_routing": True,
    }.items():
        with pytest.raises(ValueError, match=name):
            model.generate_batch(_prompts(), max_new_tokens=1, **{name: value})


def test_a_manager_serves_requests_as_they_come():
    model = causal()
    wanted = GenerationConfig(max_new_tokens=NEW, do_sample=False, eos_token_id=-1, pad_token_id=0)
    slots = ContinuousBatchingConfig(num_blocks=32, page_size=16, max_batch_tokens=16)
    expected = _generated(model)
    with model.continuous_batching_context_manager(
        generation_config=wanted, continuous_batching_config=slots
    ) as manager:
        for i, prompt in enumerate(_prompts()):
            manager.add_request(prompt, request_id=str(i), max_new_tokens=NEW)
            if i % 3 == 2:
                manager.get_result(request_id=str(i), timeout=0.01)
        found = {}
        while len(found) < len(expected):
            answer = manager.get_result(timeout=20)
            assert answer is not None and answer.error is None
            found[int(answer.request_id)] = answer.generated_tokens
    assert [found[i] for i in range(len(expected))] == expected
