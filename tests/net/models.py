"""The tiny mixtures and batches of the net."""

from __future__ import annotations

import zlib
from typing import Any

import torch
from access import E, trainable
from bases import VOCAB, causal_base, classifier_base
from torch import Tensor

from moelora import MoeLoraConfig, MoeLoraForCausalLM, MoeLoraForSequenceClassification

# Experts of different ranks, so that a block in the wrong place shows.
FIELDS = dict(
    num_experts=E,
    r=[3, 1, 2, 2],
    lora_alpha=6,
    num_experts_per_tok=2,
    target_modules="all-linear",
    router_prefix_tokens=3,
    router_aux_loss_coef=0.1,
    router_z_loss_coef=0.01,
)


def build(base: str = "llama", level: str = "token", scope: str = "site", **fields: Any) -> Any:
    """A mixture in a tiny base, with values that depend on the parameters' names alone."""
    of = classifier_base if base == "bert" else causal_base
    public = MoeLoraForSequenceClassification if base == "bert" else MoeLoraForCausalLM
    config = MoeLoraConfig(**{**FIELDS, "routing_level": level, "router_scope": scope, **fields})
    torch.manual_seed(1)
    return public.from_base(of(base), config).eval()


@torch.no_grad()
def fill(model: Any) -> Any:
    """Give every expert and router its values."""
    for name, (parameter, rows) in trainable(model).items():
        if name.startswith("base "):
            continue
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        parameter[rows] = 0.3 * torch.randn(parameter[rows].shape, generator=generator)
    return model


def batch(seed: int, prompt: int = 4, length: int = 9, classes: int = 0) -> dict[str, Tensor]:
    """Two rows, the second padded on the left by 2; the first `prompt` tokens have no labels."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCAB, (2, length), generator=generator)
    mask = torch.ones_like(ids)
    ids[1, :2] = 0
    mask[1, :2] = 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :prompt] = -100
    if classes:
        labels = torch.randint(classes, (2,), generator=generator)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def plain(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The batch without its labels."""
    return {k: v for k, v in inputs.items() if k != "labels"}
