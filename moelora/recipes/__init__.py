"""What papers do with the parts of this package: one file a paper."""

from .lorahub import search_weights
from .mixda import MixdaReport, mixda_config, train_mixda
from .replay import AddedTask, add_task, select_replay
from .updated_base import BaseUpdate, compare_bases

__all__ = [
    "AddedTask",
    "BaseUpdate",
    "MixdaReport",
    "add_task",
    "compare_bases",
    "mixda_config",
    "search_weights",
    "select_replay",
    "train_mixda",
]
