"""The models that are compared, as data: a new one is a line in `LORAS` or `MIXTURES`."""

from __future__ import annotations

import functools
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel, set_seed

from benchmarks.mixtures.training import contiguous_head, count_trainable
from moelora import MoeLoraConfig, MoeLoraForCausalLM

# lora_alpha / r of single LoRAs.
SCALE = 2.0


@dataclass(frozen=True, eq=False)
class Candidate:
    """One model to train.

    fields: of `MoeLoraConfig`, or for a single LoRA of PEFT's `LoraConfig`.
    router_rate: the routers' learning rate, as a multiple of the experts'.
    init: "slices", all experts of a site together begin as rows of one orthogonal matrix.
    labels: rows tell the routers whose task they are.
    single: one LoRA, by PEFT.
    """

    name: str
    fields: dict[str, Any]
    router_rate: float = 1.0
    init: str | None = None
    labels: bool = False
    single: bool = False

    def settings(self) -> dict[str, Any]:
        """What decides what comes out, and the name."""
        return asdict(self)


def lora(rank: int) -> Candidate:
    """A single LoRA of that rank on all linears."""
    fields = {"r": rank, "lora_alpha": SCALE * rank, "target_modules": "all-linear"}
    return Candidate(f"LoRA r={rank}", fields, single=True)


def mixture(name: str, experts: int, rank: int, top: int, **more: Any) -> Candidate:
    """A mixture on all linears; of `more` what is no field of `Candidate` is one of the config."""
    own = {k: more.pop(k) for k in ("router_rate", "init", "labels") if k in more}
    # Weights that sum to 1 over `top` experts would make each of them a part of a LoRA's step.
    scale = more.pop("scale", SCALE * top if more.get("norm_topk_prob", True) else SCALE)
    fields = {
        "num_experts": experts,
        "r": rank,
        "lora_alpha": scale * rank,
        "num_experts_per_tok": top,
        "target_modules": "all-linear",
        **more,
    }
    return Candidate(name, fields, **own)


SEQUENCE = {
    "routing_level": "sequence",
    "router_scope": "model",
    "router_input_norm": True,
    "labels": True,
}
MIXTURES = {
    made.name: made
    for made in (
        mixture("8 x r=4, top 2", 8, 4, 2),
        mixture("16 x r=2, top 4", 16, 2, 4),
        mixture("32 x r=1, top 8", 32, 1, 8),
        mixture("sequence: a task an expert, r=8", 8, 8, 1, **SEQUENCE),
    )
}
LORAS = {made.name: made for made in map(lora, (4, 8, 16, 32))}


@functools.cache
def equal_lora(path: str, made: Candidate) -> Candidate:
    """The single LoRA with the trainable parameters of a mixture, to the nearest rank."""
    per_rank = count_trainable(build(lora(1), path, seed=0))
    rank = max(1, round(count_trainable(build(made, path, seed=0)) / per_rank))
    return replace(lora(rank), name=f"LoRA r={rank}, parameters of {made.name}")


def load_base(path: str, dtype: str = "bfloat16") -> PreTrainedModel:
    """A fresh copy of the frozen base."""
    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval()


def build(made: Candidate, path: str, seed: int, dtype: str = "bfloat16") -> Any:
    """The model, untrained, in its base loaded in `dtype`; experts and adapters are in fp32."""
    base = load_base(path, dtype)
    set_seed(seed)
    if made.single:
        config = LoraConfig(**made.fields, task_type="CAUSAL_LM")
        model = get_peft_model(base, config)
    else:
        model = MoeLoraForCausalLM.from_base(base, MoeLoraConfig(**made.fields))
        if made.init == "slices":
            orthogonal_slices(model)
    contiguous_head(model)
    return model


@torch.no_grad()
def orthogonal_slices(model: Any) -> None:
    """Make A of all experts of a site rows of one orthogonal matrix, as long as before."""
    for site in model.moelora.sites.values():
        weight = site.lora_A.weight
        norm = weight.norm(dim=1).mean()
        weight.copy_(nn.init.orthogonal_(torch.empty_like(weight)) * norm)
