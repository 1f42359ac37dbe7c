"""The models that are compared: the base alone, PEFT's LoRA and X-LoRA, and mixtures, all on one
kind of base.
"""

from __future__ import annotations

import copy
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, XLoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from examples.smollm2 import load_smollm2
from moelora import MoeLoraConfig, MoeLoraForCausalLM


@dataclass(frozen=True)
class Candidate:
    """One row: `kind` base, lora, xlora or mixture, with `experts` experts of rank `r`, `top_k` a
    token.
    """

    name: str
    kind: str
    r: int = 0
    experts: int = 1
    top_k: int = 1


def load_base(name: str, num_layers: int) -> PreTrainedModel:
    """The demo's base "smollm2" cut to `num_layers`, or "tiny", random and fit for a test."""
    if name == "smollm2":
        return load_smollm2(num_layers=num_layers)[0].eval()
    if name != "tiny":
        raise ValueError(f"base={name!r} is unknown; expected smollm2 or tiny.")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=num_layers,
        # vLLM's attention on a CPU takes heads of 32 and more.
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    return LlamaForCausalLM(config).eval()


def build(candidate: Candidate, base: PreTrainedModel):
    """`candidate` over a copy of `base`, with B away from zero so that nothing is skipped."""
    model = copy.deepcopy(base)
    torch.manual_seed(1)
    if candidate.kind == "base":
        return model
    if candidate.kind == "lora":
        model = get_peft_model(model, _lora(candidate.r))
    elif candidate.kind == "xlora":
        model = _xlora(model, candidate)
    elif candidate.kind == "mixture":
        config = MoeLoraConfig(
            num_experts=candidate.experts,
            num_experts_per_tok=candidate.top_k,
            r=candidate.r,
            lora_alpha=2 * candidate.r,
            target_modules="all-linear",
        )
        model = MoeLoraForCausalLM.from_base(model, config)
    else:
        raise ValueError(
            f"kind={candidate.kind!r} is unknown; expected base, lora, xlora or mixture."
        )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.02)
    return model


def _lora(rank: int) -> LoraConfig:
    return LoraConfig(
        r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM"
    )


def _xlora(model: PreTrainedModel, candidate: Candidate) -> PeftModel:
    """PEFT's X-LoRA over `candidate.experts` adapters, which it loads from folders."""
    model.config.use_cache = False
    with tempfile.TemporaryDirectory() as folder:
        paths = {}
        for index in range(candidate.experts):
            adapter = get_peft_model(copy.deepcopy(model), _lora(candidate.r))
            paths[str(index)] = str(Path(folder) / str(index))
            adapter.save_pretrained(paths[str(index)])
        config = XLoraConfig(
            task_type="CAUSAL_LM",
            hidden_size=model.config.hidden_size,
            adapters=paths,
            top_k_lora=candidate.top_k,
        )
        return get_peft_model(model, config)
