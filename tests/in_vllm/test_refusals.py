"""Engines that could not serve a mixture exactly do not start, and others are left alone."""

from __future__ import annotations

import pytest
from in_vllm.served import (
    engine,
    generated,
    largest_difference,
    prompts,
    served,
    shut,
    tiny_base,
    tiny_mixture,
)

from moelora import MoeLoraConfig, MoeLoraForCausalLM

SETTINGS = {
    "pipeline": (dict(pipeline_parallel_size=2), "pipeline"),
    "speculation": (
        dict(speculative_config={"method": "ngram", "num_speculative_tokens": 2}),
        "speculative",
    ),
    "vLLM's LoRA": (dict(enable_lora=True), "LoRA"),
    "unknown settings": (dict(additional_config={"moelora": {"no": True}}), "expected: "),
    "fields": (dict(hf_overrides={"num_experts": 2}), "cannot|can change"),
}
MIXTURES = {
    "blocks": (dict(target_modules=None, target_blocks=["mlp"]), "target_blocks"),
    "head": (dict(target_modules=["lm_head"]), "lm_head"),
}


@pytest.mark.parametrize(("settings", "message"), SETTINGS.values(), ids=SETTINGS)
def test_settings_are_refused(settings, message, tmp_path):
    tiny_mixture(tmp_path)
    with pytest.raises(Exception, match=message):
        engine(tmp_path, **settings)


@pytest.mark.parametrize(("fields", "message"), MIXTURES.values(), ids=MIXTURES)
def test_experts_of_other_kinds_are_refused(fields, message, tmp_path):
    tiny_mixture(tmp_path, **fields)
    with pytest.raises(Exception, match=message):
        engine(tmp_path)


def test_a_mixture_that_names_no_base_is_refused(tmp_path):
    MoeLoraForCausalLM.from_base(tiny_base(), MoeLoraConfig(r=4)).save_pretrained(tmp_path)
    with pytest.raises(Exception, match="names no base"):
        engine(tmp_path)


def test_fields_that_may_change_do(tmp_path):
    tiny_mixture(tmp_path)
    llm = engine(tmp_path, hf_overrides={"num_experts_per_tok": 1})
    try:
        found = served(llm, prompts()[3:5])
    finally:
        shut(llm)
    changed = MoeLoraForCausalLM.from_pretrained(tmp_path, num_experts_per_tok=1)
    assert largest_difference(found, generated(changed, prompts()[3:5])) <= 1e-4


def test_other_models_are_left_alone(tmp_path):
    base = tiny_base()
    base.save_pretrained(tmp_path)
    llm = engine(tmp_path)
    try:
        assert llm.llm_engine.vllm_config.parallel_config.worker_extension_cls == ""
        assert not llm.llm_engine.vllm_config.model_config.logits_processors
        served(llm, prompts()[:2])
    finally:
        shut(llm)
