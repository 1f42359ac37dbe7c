"""Training with the stock `Trainer`: texts and their labels, gates alone, and what a callback logs."""

from .callback import MoeLoraCallback
from .gate import GateReport, prompt_features, train_gate
from .padding import PadRouting
from .texts import Texts

__all__ = ["GateReport", "MoeLoraCallback", "PadRouting", "Texts", "prompt_features", "train_gate"]
