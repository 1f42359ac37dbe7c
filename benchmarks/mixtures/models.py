"""The models that are compared, as data: a new one is a line in `LORAS` or `MIXTURES`."""

from __future__ import annotations

import functools
import json
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
        # A shared expert's weight is 1, whatever the others' are.
        mixture("7 routed and 1 shared, r=4, top 2", 8, 4, 2, num_shared_experts=1, scale=SCALE),
        mixture("sequence: a task an expert, r=8", 8, 8, 1, **SEQUENCE),
    )
}
LORAS = {made.name: made for made in map(lora, (4, 8, 16, 32))}


# What is tried one change at a time; measured only where it is asked for by name.
VARIANTS = {
    made.name: made
    for made in (
        mixture("8 x r=4, top 2, half the scale", 8, 4, 2, scale=SCALE),
        mixture("8 x r=4, top 2, probabilities", 8, 4, 2, norm_topk_prob=False),
        mixture("8 x r=4, top 2, slices", 8, 4, 2, init="slices"),
        mixture("8 x r=4, top 2, input norm", 8, 4, 2, router_input_norm=True),
        mixture("8 x r=4, top 2, routers x 5", 8, 4, 2, router_rate=5.0),
        mixture("8 x r=4, top 2, routers x 0.2", 8, 4, 2, router_rate=0.2),
        mixture("8 x r=4, top 2, no balancing", 8, 4, 2, router_aux_loss_coef=0.0),
        mixture("8 x r=4, top 2, a router a layer", 8, 4, 2, router_scope="layer"),
        mixture("8 x r=4, top 2, labels", 8, 4, 2, labels=True),
        mixture("4 x r=8, top 1", 4, 8, 1),
        mixture("8 x r=4, all experts", 8, 4, 8),
        mixture("sequence, learned: 8 x r=4, top 2", 8, 4, 2, **{**SEQUENCE, "labels": False}),
    )
}


def equal_lora(path: str, made: Candidate) -> Candidate:
    """The single LoRA with the trainable parameters of a mixture, to the nearest rank."""
    rank = max(1, round(_trainable(path, made) / _trainable(path, lora(1))))
    return replace(lora(rank), name=f"LoRA r={rank}, parameters of {made.name}")


def _trainable(path: str, made: Candidate) -> int:
    return _counted(path, json.dumps(made.settings()))


@functools.cache
def _counted(path: str, settings: str) -> int:
    """The trainable parameters of a model with these settings, which is built for it."""
    return count_trainable(build(Candidate(**json.loads(settings)), path, seed=0))


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
