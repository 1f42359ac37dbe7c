"""What papers do with the parts of this package: one file a paper."""

from .lorahub import search_weights
from .mixda import MixdaReport, train_mixda
from .replay import AddedTask, add_task, select_replay

__all__ = ["AddedTask", "MixdaReport", "add_task", "search_weights", "select_replay", "train_mixda"]
