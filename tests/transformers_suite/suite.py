"""transformers' own `ModelTesterMixin` on mixtures at token and at sequence level.

    make test-transformers

The name of this file keeps it out of `make test`: the tests come from transformers' sdist. The
sdist lacks `GenerationTesterMixin`; generation is tested in tests/core/test_generation.py.
"""

from __future__ import annotations

import unittest
from typing import Any

import pytest
import torch
from transformers import (
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedModel,
)
from transformers_suite.models import mixture_class
from transformers_suite.not_applicable import NEEDS_ROUTER_MASK, NOT_APPLICABLE
from transformers_tests.generation.test_utils import GenerationTesterMixin
from transformers_tests.test_modeling_common import ModelTesterMixin, ids_tensor

FIELDS: dict[str, Any] = dict(
    num_experts=4,
    r=3,
    lora_alpha=6,
    num_experts_per_tok=2,
    target_modules="all-linear",
    router_prefix_tokens=2,
)
COMMON = dict(vocab_size=99, num_labels=3, pad_token_id=0, bos_token_id=1, eos_token_id=98)
LLAMA = dict(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=128,
)
GPT2 = dict(n_embd=32, n_layer=2, n_head=4, n_positions=128)


class Tester:
    """What `ModelTesterMixin` asks for a configuration and inputs."""

    is_training = True
    batch_size = 5
    seq_length = 7
    num_hidden_layers = 2
    hidden_size = 32
    num_attention_heads = 4

    def __init__(self, config_class: type, settings: dict[str, Any], with_router_mask: bool):
        self.config_class = config_class
        self.settings = settings
        self.with_router_mask = with_router_mask

    def get_config(self) -> Any:
        """A small configuration of the base."""
        return self.config_class(**COMMON, **self.settings)

    def prepare_config_and_inputs_for_common(self) -> tuple[Any, dict[str, torch.Tensor]]:
        """The configuration, and rows of one to five tokens, padded on the right."""
        ids = ids_tensor([self.batch_size, self.seq_length], COMMON["vocab_size"] - 2) + 1
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids).tril()}
        if self.with_router_mask:
            inputs["router_mask"] = inputs["attention_mask"].bool()
        return self.get_config(), inputs


class Common(ModelTesterMixin, GenerationTesterMixin):
    """The tests of one architecture at one routing level."""

    config_class: type
    settings: dict[str, Any]
    bases: tuple[type[PreTrainedModel], ...]
    fields: dict[str, Any]

    @classmethod
    def setUpClass(cls) -> None:
        config = Tester(cls.config_class, cls.settings, with_router_mask=False).get_config()
        cls.all_model_classes = tuple(
            mixture_class(base, config, **FIELDS, **cls.fields) for base in cls.bases
        )

    def setUp(self) -> None:
        name = self._testMethodName
        if reason := NOT_APPLICABLE.get(name):
            pytest.skip(reason)
        masked = name in NEEDS_ROUTER_MASK and self.fields["routing_level"] == "sequence"
        self.model_tester = Tester(self.config_class, self.settings, masked)


class Llama(Common):
    """In a Llama."""

    config_class = LlamaConfig
    settings = LLAMA
    bases = (LlamaForCausalLM, LlamaForSequenceClassification)


class GPT2Like(Common):
    """In a GPT-2: `Conv1D` for linears, tied embeddings, learned positions."""

    config_class = GPT2Config
    settings = GPT2
    bases = (GPT2LMHeadModel, GPT2ForSequenceClassification)


class TestLlamaToken(Llama, unittest.TestCase):
    fields = {"routing_level": "token"}


class TestLlamaSequence(Llama, unittest.TestCase):
    fields = {"routing_level": "sequence"}


class TestGPT2Token(GPT2Like, unittest.TestCase):
    fields = {"routing_level": "token"}


class TestGPT2Sequence(GPT2Like, unittest.TestCase):
    fields = {"routing_level": "sequence"}
