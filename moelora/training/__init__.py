"""Training with the stock `Trainer`: texts and their labels, gates alone, recipes, and what a callback logs."""

from .callback import MoeLoraCallback
from .fitting import Trained
from .gate import GateReport, prompt_features, train_gate
from .mixda import MixdaReport, train_mixda
from .oracle import OracleLabels, oracle_targets
from .padding import PadRouting
from .replay import AddedTask, add_task, select_replay
from .stages import StagesReport, train_expert, train_in_stages, train_jointly
from .texts import Texts

__all__ = [
    "AddedTask",
    "GateReport",
    "MixdaReport",
    "MoeLoraCallback",
    "OracleLabels",
    "PadRouting",
    "StagesReport",
    "Texts",
    "Trained",
    "add_task",
    "oracle_targets",
    "prompt_features",
    "select_replay",
    "train_expert",
    "train_gate",
    "train_in_stages",
    "train_jointly",
    "train_mixda",
]
