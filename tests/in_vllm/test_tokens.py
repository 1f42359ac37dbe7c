"""Each token routed by itself: the engine says what `generate` says."""

from __future__ import annotations

import pytest
from in_vllm.served import (
    CROWD,
    SMALL_CACHE,
    counted,
    differing,
    engine,
    generated,
    largest_difference,
    prompts,
    served,
    shut,
    tiny_base,
    tiny_mixture,
)

TOLERANCE = 1e-4
# 8 requests share 4 places, and prompts come in chunks of 64 tokens, in all of them.
MIXTURES = {
    "site": dict(),
    "layer": dict(router_scope="layer"),
    "model": dict(router_scope="model", router_layer=1),
    "projection, null expert, MLP router": dict(
        router_scope="projection", null_expert=True, router="mlp", router_input_norm=True
    ),
    "shared experts of other ranks": dict(num_shared_experts=1, r=[2, 3, 4, 5]),
    "fewer experts in some layers, balanced": dict(
        experts_per_layer=[2, 3, 4], router_bias_update_rate=0.01
    ),
    "ids of tokens": dict(router="hashed"),
    "one A, soft": dict(share_lora_A=True, router="soft"),
    "64 experts": dict(num_experts=64, r=2, lora_alpha=1),
    "bottlenecks": dict(expert_activation="gelu"),
    "in series": dict(expert_placement="series"),
    "some linears": dict(target_modules=["k_proj", "o_proj", "up_proj"], layers_to_transform=[1]),
}


@pytest.mark.parametrize("fields", MIXTURES.values(), ids=MIXTURES)
def test_the_engine_says_what_generate_says(fields, tmp_path):
    base = tiny_base()
    alone = generated(base, prompts())
    mixture = tiny_mixture(tmp_path, base, **fields)
    expected = generated(mixture, prompts())
    assert differing(alone, expected) >= 6
    llm = engine(tmp_path)
    try:
        assert largest_difference(served(llm, prompts()), expected) <= TOLERANCE
    finally:
        shut(llm)


def test_prefixes_are_shared_and_requests_make_room(tmp_path):
    mixture = tiny_mixture(tmp_path)
    rows = [*prompts(), *prompts(CROWD)]
    expected = generated(mixture, rows)
    llm = engine(tmp_path, enable_prefix_caching=True, **SMALL_CACHE)
    try:
        for _ in range(2):
            assert largest_difference(served(llm, rows), expected) <= TOLERANCE
        assert counted(llm, "vllm:num_preemptions") > 0
        # So small a cache forgets a prompt before it comes again; the longest comes twice in a row.
        for _ in range(2):
            assert largest_difference(served(llm, rows[7:8]), expected[7:8]) <= TOLERANCE
        assert counted(llm, "vllm:prefix_cache_hits") > 0
    finally:
        shut(llm)
