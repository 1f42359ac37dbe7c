"""Training with the stock `Trainer`: texts and their labels, recipes, routers alone, a callback."""

from .callback import MoeLoraCallback
from .datasets import PadRouting, Texts
from .fitting import StagesReport, Trained, train_expert, train_in_stages, train_jointly
from .gate import GateReport, prompt_features, train_gate
from .oracle import OracleLabels, oracle_targets

__all__ = [
    "GateReport",
    "MoeLoraCallback",
    "OracleLabels",
    "PadRouting",
    "StagesReport",
    "Texts",
    "Trained",
    "oracle_targets",
    "prompt_features",
    "train_expert",
    "train_gate",
    "train_in_stages",
    "train_jointly",
]
