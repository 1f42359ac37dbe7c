"""Routers: from hidden states to the experts that act."""

from .base import ROUTERS, ArrowRouter, MlpRouter, Router, Routing, TopKRouter, register_router
from .descriptor import DescriptorRouter
