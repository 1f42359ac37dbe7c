"""Adapters made by PEFT itself on the tiny bases, in folders as PEFT saves them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from bases import causal_base, classifier_base
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# Attention and MLP of the five bases that the issue names; "bert" is a classifier.
BASES = ("llama", "qwen3", "gpt2", "opt", "bert")
ATTENTION = {
    "llama": ["q_proj", "v_proj"],
    "qwen3": ["q_proj", "k_proj", "o_proj"],
    "gpt2": ["c_attn"],
    "opt": ["q_proj", "v_proj"],
    "bert": ["query", "value"],
}
MLP = {
    "llama": ["gate_proj", "down_proj"],
    "qwen3": ["up_proj", "down_proj"],
    "gpt2": ["c_fc", "mlp.c_proj"],
    "opt": ["fc1", "fc2"],
    "bert": ["intermediate.dense", "output.dense"],
}


def base_of(name: str, seed: int = 0) -> PreTrainedModel:
    """The tiny base of one of `BASES`: the same weights at every call."""
    return classifier_base(name, seed) if name == "bert" else causal_base(name, seed)


def peft_model(
    base: PreTrainedModel | str, seed: int = 1, std: float = 0.3, **fields: Any
) -> PeftModel:
    """`base` with a PEFT LoRA whose A and B are drawn from `seed`; fields are `LoraConfig`'s."""
    if isinstance(base, str):
        fields = {"target_modules": ATTENTION[base]} | fields
        base = base_of(base)
    model = get_peft_model(base, LoraConfig(**fields))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
    return model.eval()


def save_adapter(
    folder: Path | str, base: PreTrainedModel | str = "llama", seed: int = 1, **fields: Any
) -> str:
    """Write such an adapter with PEFT's `save_pretrained`; returns the folder's path."""
    peft_model(base, seed, **fields).save_pretrained(str(folder))
    return str(folder)


def mixed_adapters(folder: Path, base: str) -> dict[str, str]:
    """Four adapters of ranks 4, 8, 16 and 32 that differ in everything that PEFT lets differ."""
    attention, mlp = ATTENTION[base], MLP[base]
    first, patterned = attention[0], mlp[0]
    settings: dict[str, dict[str, Any]] = {
        "small": dict(r=4, lora_alpha=8, target_modules=attention),
        "patterns": dict(
            r=8,
            lora_alpha=4,
            target_modules=attention + mlp,
            rank_pattern={patterned: 2, rf"\d+\..*{re.escape(first)}": 5},
            alpha_pattern={rf".*0\..*{re.escape(patterned)}": 3},
        ),
        "stable": dict(r=16, lora_alpha=7, use_rslora=True, target_modules=mlp),
        "large": dict(r=32, lora_alpha=32, target_modules=attention, layers_to_transform=[1]),
    }
    made = enumerate(settings.items(), start=11)
    return {
        name: save_adapter(folder / name, base, seed, **fields) for seed, (name, fields) in made
    }


@torch.no_grad()
def peft_logits(base: str, folder: str, ids: Tensor) -> Tensor:
    """The logits of the stock `PeftModel` for the adapter in `folder`."""
    return PeftModel.from_pretrained(base_of(base), folder).eval()(input_ids=ids).logits


def edit_config(folder: Path | str, **changes: Any) -> str:
    """Change fields of an adapter_config.json in place."""
    path = Path(folder) / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return str(folder)


def edit_tensors(folder: Path | str, **changes: Any) -> str:
    """Rewrite the weights' file: the tensor whose name contains the key (with _ for .) becomes what
    is given.

    A function is called with the tensor; None drops it.
    """
    path = Path(folder) / WEIGHTS
    tensors = load_file(path)
    for part, change in changes.items():
        name = next(k for k in tensors if part in k.replace(".", "_"))
        tensor = tensors.pop(name)
        if change is not None:
            tensors[name] = change(tensor) if callable(change) else change
    save_file(tensors, path)
    return str(folder)
