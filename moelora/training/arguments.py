"""What recipes check of a model and its data before anything trains."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import TrainingArguments

from ..core.model import MixtureModel
from ..validation import check_names
from .datasets import Texts


def check_arguments(model: MixtureModel, data: Any, args: Any, null_expert: bool) -> None:
    """Raise where a recipe cannot use its data, by expert (perhaps "(base)" too), or its `args`."""
    check_not_overridden(model)
    for name, value, kind, expected in (
        ("args", args, TrainingArguments, "transformers' TrainingArguments"),
        ("The data", data, Mapping, "a mapping: by expert its own"),
    ):
        if not isinstance(value, kind):
            raise TypeError(f"{name} is a {type(value).__name__}; expected {expected}.")
    config = model.moelora_config
    names = config.choice_names if null_expert else config.expert_names or []
    check_names(data, names)
    if not data:
        raise ValueError(f"There is no data: give some of each of {', '.join(names)}.")
    for name, own in data.items():
        if hasattr(own, "__len__") and not len(own):
            raise ValueError(f"There is nothing to train {name!r} on: give some, or leave it out.")


def check_not_overridden(model: MixtureModel) -> None:
    """Raise ValueError inside `use_experts`."""
    if model.moelora.overridden:
        raise ValueError(
            "This cannot be done inside use_experts(), which forces experts: leave it first."
        )


def check_texts(name: str, texts: Any) -> None:
    """Raise TypeError unless `texts`, which the caller calls `name`, is a `Texts`."""
    if not isinstance(texts, Texts):
        raise TypeError(f"{name} is a {type(texts).__name__}; expected Texts: use Texts.of(…).")
