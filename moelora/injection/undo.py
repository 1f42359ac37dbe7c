"""What is done to a base in passing, or fails, is undone as a whole."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import PreTrainedModel


def snapshot(model: PreTrainedModel) -> Callable[[], None]:
    """What gives `model` back all that it is now, but for its weights' values: its class, its
    settings, every module's attributes, submodules, buffers and hooks, and what trains.
    """
    cls = type(model)
    contents: list[dict[str, Any]] = [vars(model.config)]
    for module in model.modules():
        # Submodules, buffers and hooks lie in dicts among the attributes.
        contents += [vars(module), *(v for v in vars(module).values() if isinstance(v, dict))]
    before = [(own, dict(own)) for own in contents]
    trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]

    def restore() -> None:
        model.__class__ = cls
        for own, then in before:
            own.clear()
            own.update(then)
        for parameter, requires_grad in trained:
            parameter.requires_grad_(requires_grad)

    return restore
