"""Routers that read prompts: one choice a request, kept while it is answered."""

from __future__ import annotations

import pytest
from in_vllm.served import (
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
    alone = generated(base, prompts())
    mixture = tiny_mixture(tmp_path, base, **fields)
    expected = generated(mixture, prompts())
    assert differing(alone, expected) >= 5
    # Little room: requests are preempted, and read their whole prompts again.
    small = dict(num_gpu_blocks_override=10, block_size=32, disable_log_stats=False)
    llm = engine(tmp_path, enable_prefix_caching=None, **small)
    try:
        settings = llm.llm_engine.vllm_config
        assert not settings.cache_config.enable_prefix_caching
        assert not settings.scheduler_config.enable_chunked_prefill
        for _ in range(2):
            assert largest_difference(served(llm, prompts()), expected) <= TOLERANCE
        assert counted(llm, "vllm:num_preemptions") > 0
    finally:
        shut(llm)
