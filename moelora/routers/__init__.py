"""Routers: from hidden states to the experts that act. Importing it registers the built-in ones."""

from ..registry import ROUTERS, router_class
from .base import Router, Routing, register_router
from .context import ContextRouter
from .cosine import CosineRouter
from .deciding import SoftRouter, SparsegenRouter, ThresholdRouter, TopPRouter
from .descriptor import DescriptorRouter
from .hashed import HashedRouter
from .hybrid import HybridRouter, PromptScores
from .mlp import MlpRouter
from .noisy import NoisyTopKRouter
from .options import changed_options
from .top_k import ArrowRouter, TopKRouter
from .uniform import RandomRouter

__all__ = [
    "ROUTERS",
    "ArrowRouter",
    "ContextRouter",
    "CosineRouter",
    "DescriptorRouter",
    "HashedRouter",
    "HybridRouter",
    "MlpRouter",
    "NoisyTopKRouter",
    "PromptScores",
    "RandomRouter",
    "Router",
    "Routing",
    "SoftRouter",
    "SparsegenRouter",
    "ThresholdRouter",
    "TopKRouter",
    "TopPRouter",
    "changed_options",
    "register_router",
    "router_class",
]
