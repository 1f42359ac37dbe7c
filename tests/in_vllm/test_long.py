"""What takes longer: vLLM's compiler, and linears cut for two processes."""

from __future__ import annotations

import pytest
from in_vllm.served import (
    engine,
    generated,
    largest_difference,
    params,
    prompts,
    served,
    shut,
    tiny_base,
    tiny_mixture,
)

TOLERANCE = 1e-4
MIXTURES = {
    "site": dict(),
    "model, sequence": dict(router_scope="model", routing_level="sequence"),
    "layer": dict(router_scope="layer", null_expert=True),
}


@pytest.mark.parametrize("fields", MIXTURES.values(), ids=MIXTURES)
def test_under_the_compiler(fields, tmp_path):
    mixture = tiny_mixture(tmp_path, **fields)
    expected = generated(mixture, prompts())
    llm = engine(tmp_path, enforce_eager=False)
    try:
        assert largest_difference(served(llm, prompts()), expected) <= TOLERANCE
        with mixture.use_experts("expert_1"):
            one = generated(mixture, prompts()[:3])
        asked = params(use_experts="expert_1")
        assert largest_difference(served(llm, prompts()[:3], asked), one) <= TOLERANCE
    finally:
        shut(llm)


@pytest.mark.parametrize("fields", MIXTURES.values(), ids=MIXTURES)
def test_in_two_processes(fields, tmp_path, monkeypatch):
    # With one head of keys and values both processes have the same, with two each its own.
    heads = dict(num_attention_heads=4, hidden_size=128, num_key_value_heads=2)
    base = tiny_base(**(heads if "router_scope" not in fields else {}))
    mixture = tiny_mixture(tmp_path, base, **fields)
    expected = generated(mixture, prompts())
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    llm = engine(tmp_path, tensor_parallel_size=2)
    try:
        assert largest_difference(served(llm, prompts()), expected) <= TOLERANCE
    finally:
        shut(llm)
