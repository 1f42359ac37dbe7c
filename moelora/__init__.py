"""Mixtures of LoRA experts for transformers. Importing this registers the Auto classes."""

from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from .config import MoeLoraConfig
from .core.experts import LoraFactors
from .core.report import RoutingReport
from .expert_pool import PoolChange, resume_optimizer
from .modeling import MoeLoraForCausalLM, MoeLoraForSequenceClassification
from .routers import ROUTERS, Router, Routing, register_router
from .training import MoeLoraCallback, PadRouting, Texts, train_gate

__version__ = "0.1.0"

__all__ = [
    "ROUTERS",
    "LoraFactors",
    "MoeLoraCallback",
    "MoeLoraConfig",
    "MoeLoraForCausalLM",
    "MoeLoraForSequenceClassification",
    "PadRouting",
    "PoolChange",
    "Router",
    "Routing",
    "RoutingReport",
    "Texts",
    "register_router",
    "resume_optimizer",
    "train_gate",
]

AutoConfig.register(MoeLoraConfig.model_type, MoeLoraConfig, exist_ok=True)
AutoModelForCausalLM.register(MoeLoraConfig, MoeLoraForCausalLM, exist_ok=True)
AutoModelForSequenceClassification.register(
    MoeLoraConfig, MoeLoraForSequenceClassification, exist_ok=True
)
