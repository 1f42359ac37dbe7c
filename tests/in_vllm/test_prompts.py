"""Routers that read prompts: one choice a request, kept while it is answered."""

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
MIXTURES = {
    "site": dict(routing_level="sequence"),
    "layer, attention": dict(
        routing_level="sequence", router_scope="layer", router_pooling="attention"
    ),
    "model, null expert, shared": dict(
        routing_level="sequence",
        router_scope="model",
        null_expert=True,
        num_shared_experts=1,
        num_experts_per_tok=1,
    ),
    "blended with tokens": dict(router="hybrid"),
}


@pytest.mark.parametrize("fields", MIXTURES.values(), ids=MIXTURES)
def test_the_engine_routes_each_prompt_as_generate_does(fields, tmp_path):
    base = tiny_base()
    rows = [*prompts(), *prompts(CROWD)]
    alone = generated(base, rows)
    mixture = tiny_mixture(tmp_path, base, **fields)
    expected = generated(mixture, rows)
    assert differing(alone, expected) >= 8
    # Little room: requests are preempted, and read their whole prompts again.
    llm = engine(tmp_path, enable_prefix_caching=None, **SMALL_CACHE)
    try:
        settings = llm.llm_engine.vllm_config
        assert not settings.cache_config.enable_prefix_caching
        assert not settings.scheduler_config.enable_chunked_prefill
        assert largest_difference(served(llm, rows), expected) <= TOLERANCE
        assert counted(llm, "vllm:num_preemptions") > 0
    finally:
        shut(llm)
