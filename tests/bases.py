"""Tiny random bases of many architectures; the tests' only list of them."""

from __future__ import annotations

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
)

VOCAB = 64
_LLAMA_LIKE = dict(
    vocab_size=VOCAB,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=128,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
)
_BERT_LIKE = dict(
    vocab_size=VOCAB,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=128,
    pad_token_id=0,
)
_GPT_LIKE = dict(
    vocab_size=VOCAB,
    n_embd=32,
    n_layer=2,
    n_head=4,
    n_positions=128,
    bos_token_id=1,
    eos_token_id=2,
)

CAUSAL = {
    "llama": _LLAMA_LIKE,
    "qwen3": {**_LLAMA_LIKE, "head_dim": 8},
    "mistral": _LLAMA_LIKE,
    "gemma3_text": {**_LLAMA_LIKE, "head_dim": 8},
    "phi3": _LLAMA_LIKE,
    "gpt2": _GPT_LIKE,
    "gpt_neox": {**_BERT_LIKE, "bos_token_id": 1, "eos_token_id": 2},
    "gptj": {**_GPT_LIKE, "rotary_dim": 4},
    "opt": {
        **{
            k: v
            for k, v in _LLAMA_LIKE.items()
            if k not in ("intermediate_size", "num_key_value_heads")
        },
        "ffn_dim": 48,
        "word_embed_proj_dim": 32,
    },
    "bloom": dict(
        vocab_size=VOCAB,
        hidden_size=32,
        n_layer=2,
        n_head=4,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    ),
    "mamba": dict(
        vocab_size=VOCAB,
        hidden_size=32,
        num_hidden_layers=2,
        state_size=8,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    ),
}
CLASSIFIERS = {
    "bert": _BERT_LIKE,
    "modernbert": {
        **_BERT_LIKE,
        "cls_token_id": 1,
        "sep_token_id": 2,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "llama": _LLAMA_LIKE,
}
# Not asked for by anyone, and so a test that nothing knows the names above: a fused parallel block,
# routed experts of its own (an operator that the fake forward lacks in fp32), another state space
# model.
UNHEARD_OF = {
    "falcon": dict(
        vocab_size=VOCAB,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        bos_token_id=1,
        eos_token_id=2,
    ),
    "mixtral": {**_LLAMA_LIKE, "num_local_experts": 4},
    "stablelm": _LLAMA_LIKE,
    "olmo2": _LLAMA_LIKE,
}


def causal_base(name: str = "llama", seed: int = 0, **changes) -> PreTrainedModel:
    """A tiny random causal language model in fp32, in eval mode."""
    torch.manual_seed(seed)
    settings = {**CAUSAL, **UNHEARD_OF}[name] | changes
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **settings)).eval()


def classifier_base(name: str = "bert", seed: int = 0, **changes) -> PreTrainedModel:
    """A tiny random sequence classifier of three classes in fp32, in eval mode."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(name, **(CLASSIFIERS[name] | changes), num_labels=3)
    return AutoModelForSequenceClassification.from_config(config).eval()
