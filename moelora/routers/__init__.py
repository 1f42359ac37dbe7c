"""Routers: from hidden states to the experts that act. Importing it registers the built-in ones."""

from ..registry import ROUTERS, router_class
from .arrow import ArrowRouter
from .base import Router, Routing
from .descriptor import DescriptorRouter
from .mlp import MlpRouter
from .registry import changed_options, register_router
from .top_k import TopKRouter

__all__ = [
    "ROUTERS",
    "ArrowRouter",
    "DescriptorRouter",
    "MlpRouter",
    "Router",
    "Routing",
    "TopKRouter",
    "changed_options",
    "register_router",
    "router_class",
]
