"""Mixtures of LoRA experts for transformers. Importing this registers the Auto classes."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from .config import MoeLoraConfig
from .core.experts import LoraFactors
from .core.report import RoutingReport
from .modeling import MoeLoraForCausalLM, MoeLoraForSequenceClassification
from .routers import ROUTERS, Router, Routing, register_router

if TYPE_CHECKING:
    from .expert_pool import PoolChange, resume_optimizer
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

# What is imported when it is first asked for, since Trainer and PEFT take seconds: names and rooms.
_LATER = {
    "PoolChange": "expert_pool",
    "resume_optimizer": "expert_pool",
    "MoeLoraCallback": "training",
    "PadRouting": "training",
    "Texts": "training",
    "train_gate": "training",
}
_ROOMS = ("adapters", "checkpoint", "expert_pool", "injection", "recipes", "training", "serving")


def __getattr__(name: str) -> Any:
    if name in _LATER:
        return getattr(import_module(f".{_LATER[name]}", __name__), name)
    if name in _ROOMS:
        return import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_ROOMS})


AutoConfig.register(MoeLoraConfig.model_type, MoeLoraConfig, exist_ok=True)
AutoModelForCausalLM.register(MoeLoraConfig, MoeLoraForCausalLM, exist_ok=True)
AutoModelForSequenceClassification.register(
    MoeLoraConfig, MoeLoraForSequenceClassification, exist_ok=True
)
