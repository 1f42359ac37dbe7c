"""Experts that come and go in a trained mixture, and what an optimizer keeps of them."""

from .optimizer_state import PoolChange, resume_optimizer

__all__ = ["PoolChange", "resume_optimizer"]
