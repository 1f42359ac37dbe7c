"""Training with the stock `Trainer`: a callback."""

from .callback import MoeLoraCallback

__all__ = ["MoeLoraCallback"]
