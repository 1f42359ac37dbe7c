"""The bases that the tasks are learned on, as folders that every worker loads for itself."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from examples.smollm2 import converted_folder, load_smollm2

END = "<end>"


def prepare(name: str, layers: int | None, folder: Path) -> str:
    """An id or folder to load `name` from: smollm2 (the demo's base), tiny, or itself an id or a
    folder.

    Raises:
        ValueError: `layers` with a base that is neither smollm2 nor tiny.
    """
    if name not in ("smollm2", "tiny"):
        if layers is not None:
            raise ValueError(f"layers={layers} cuts smollm2 or tiny, not {name!r}: leave it out.")
        return name
    if name == "smollm2" and layers is None:
        return str(converted_folder())
    model, tokenizer = _tiny(layers or 2) if name == "tiny" else load_smollm2(num_layers=layers)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def load(path: str) -> PreTrainedModel:
    """A fresh copy of the base in fp32, in eval mode."""
    return AutoModelForCausalLM.from_pretrained(path, dtype="float32").eval()


def load_tokenizer(path: str) -> PreTrainedTokenizerBase:
    """The base's tokenizer, with something to pad with."""
    tokenizer = AutoTokenizer.from_pretrained(path)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that pads."""
    return int(tokenizer.pad_token_id)  # type: ignore[arg-type]


def _tiny(layers: int) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A random Llama that reads bytes: small enough for a test, and for machines without the demo's
    wheel.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    reader = Tokenizer(
        models.BPE(vocab={c: i for i, c in enumerate(alphabet)} | {END: len(alphabet)}, merges=[])
    )
    reader.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    reader.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=reader, eos_token=END, pad_token=END)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        eos_token_id=len(alphabet),
        pad_token_id=len(alphabet),
    )
    return LlamaForCausalLM(config).eval(), tokenizer
