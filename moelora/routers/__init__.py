"""Routers: from hidden states to the experts that act. Importing it registers the built-in ones."""

from ..registry import ROUTERS, router_class
from .base import Router, Routing, register_router
from .context import ContextRouter
from .descriptor import DescriptorRouter
from .hashed import HashedRouter
from .hybrid import HybridRouter, PromptScores
from .mlp import MlpRouter
from .options import changed_options
from .top_k import ArrowRouter, TopKRouter

__all__ = [
    "ROUTERS",
    "ArrowRouter",
    "ContextRouter",
    "DescriptorRouter",
    "HashedRouter",
    "HybridRouter",
    "MlpRouter",
    "PromptScores",
    "Router",
    "Routing",
    "TopKRouter",
    "changed_options",
    "register_router",
    "router_class",
]
