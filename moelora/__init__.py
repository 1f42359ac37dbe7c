"""Mixtures of LoRA experts for Hugging Face transformers. Importing this registers the Auto
classes.
"""

from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from .config import MoeLoraConfig
from .core.report import RoutingReport
from .modeling import MoeLoraForCausalLM, MoeLoraForSequenceClassification
from .routers import ROUTERS, Router, Routing, register_router

__version__ = "0.1.0"

__all__ = [
    "ROUTERS",
    "MoeLoraConfig",
    "MoeLoraForCausalLM",
    "MoeLoraForSequenceClassification",
    "Router",
    "Routing",
    "RoutingReport",
    "register_router",
]

AutoConfig.register(MoeLoraConfig.model_type, MoeLoraConfig, exist_ok=True)
AutoModelForCausalLM.register(MoeLoraConfig, MoeLoraForCausalLM, exist_ok=True)
AutoModelForSequenceClassification.register(
    MoeLoraConfig, MoeLoraForSequenceClassification, exist_ok=True
)
