"""Autocast, asked and left in one way."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch


def autocasts(device_type: str) -> bool:
    """Whether autocast is on; it is unknown to some devices, as meta."""
    # Not torch.amp.is_autocast_available, which torch.compile could not trace before 2.13.
    return device_type != "meta" and torch.is_autocast_enabled(device_type)


def without_autocast(device_type: str) -> Any:
    """A context in which nothing is cast."""
    return torch.autocast(device_type, enabled=False) if autocasts(device_type) else nullcontext()
