"""Mixtures of LoRA experts as operations on tensors: y = out + Σ_e w_e · s_e · (x A_eᵀ) B_e."""

from .api import BACKENDS, expand, lora_mixture, plan_decoding, router_logits, shrink
from .dispatch import PATHS, Shape, can_decode, choose_backend, explain
from .layout import Layout
from .plan import Plan, TopK, build_decode_plan, build_plan

__all__ = [
    "BACKENDS",
    "PATHS",
    "Layout",
    "Plan",
    "Shape",
    "TopK",
    "build_decode_plan",
    "build_plan",
    "can_decode",
    "choose_backend",
    "expand",
    "explain",
    "lora_mixture",
    "plan_decoding",
    "router_logits",
    "shrink",
]
