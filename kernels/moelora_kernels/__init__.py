"""Mixtures of LoRA experts as operations on tensors: y = out + Σ_e w_e · s_e · (x A_eᵀ) B_e."""

from .api import BACKENDS, expand, lora_mixture, shrink
from .plan import PATHS, Plan, build_plan, choose_path

__all__ = [
    "BACKENDS",
    "PATHS",
    "Plan",
    "build_plan",
    "choose_path",
    "expand",
    "lora_mixture",
    "shrink",
]
