"""One lora_A for all experts of a linear: x is shrunk once, and every expert has the same h."""

from __future__ import annotations

import torch
from torch import Tensor

from .layout import Layout


def repeated(lora_A: Tensor, layout: Layout) -> Tensor:
    """The factor with a copy for each expert, [Σ_l R_l, d_in], as `layout` says; differentiable."""
    own = lora_A.split(layout.widths)
    return torch.cat([block.repeat(layout.num_experts, 1) for block in own])


def of_all_experts(h: Tensor, layout: Layout) -> tuple[Tensor, ...]:
    """h [T, Σ_l r_l] as that of all experts, [T, R_l] for every linear l."""
    return tuple(own.repeat(1, layout.num_experts) for own in h.split(layout.widths, dim=1))


def of_slots(h: Tensor, layout: Layout, *shape: int) -> tuple[Tensor, ...]:
    """h [T, Σ_l r_l] as that of the slots, [*shape, r_l] for every linear l: views, whose last axis
    but one has stride 0.
    """
    parts = h.split(layout.widths, dim=1)
    return tuple(own.view(*shape[:-1], 1, own.shape[1]).expand(*shape, -1) for own in parts)
