"""The rooms behind the public methods; each is imported when a method first needs it.

Together they take seconds to import (PEFT, Trainer), of which a process that only registers the
Auto classes needs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .adapters import composing, export
    from .checkpoint import load, save, state
    from .expert_pool import changes
    from .injection import base, inject, offloading
    from .training import router_init

PLACES = {
    "composing": "adapters",
    "export": "adapters",
    "load": "checkpoint",
    "save": "checkpoint",
    "state": "checkpoint",
    "changes": "expert_pool",
    "base": "injection",
    "inject": "injection",
    "offloading": "injection",
    "router_init": "training",
}
__all__ = [
    "base",
    "changes",
    "composing",
    "export",
    "inject",
    "load",
    "offloading",
    "router_init",
    "save",
    "state",
]


def __getattr__(name: str) -> Any:
    """The module of that name in its room."""
    if name not in PLACES:
        raise AttributeError(f"{__name__} has no {name!r}.")
    return import_module(f".{PLACES[name]}.{name}", __package__)
