"""What a mixture keeps for the backward pass: rank-sized tensors and its input as it is."""

from __future__ import annotations

import torch
from core.mixtures import causal
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

INPUT = torch.arange(2 * 16).view(2, 16) % 11 + 3


def test_16_bit_activations_are_not_kept_in_fp32() -> None:
    """A router that casts its input keeps twice the input of every site: more than a single LoRA
    keeps in all.
    """
    model = causal().to(torch.bfloat16).train()
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        model(INPUT, labels=INPUT)
    flat = {(INPUT.numel(), site.in_features) for site in model.moelora.sites.values()}
    assert flat and not [
        t.shape for t in kept if t.dtype == torch.float32 and tuple(t.shape) in flat
    ]
