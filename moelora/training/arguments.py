"""What recipes check of a model and its data before anything trains."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import TrainingArguments

from ..core.model import MixtureModel
from ..validation import check_names
from .datasets import Texts


def check_arguments(model: MixtureModel, data: Any, args: Any, null_expert: bool) -> None:
    """Raise before anything trains where a recipe cannot use its data or `args`.

    Args:
        model: the mixture that is to train.
        data: by expert what it trains on.
        args: the `TrainingArguments`.
        null_expert: whether "(base)" may have data too.

    Raises:
        ValueError: unknown experts, nothing to train on, or inside `use_experts`.
        TypeError: no mapping, or no `TrainingArguments`.
    """
    check_not_overridden(model)
    if not isinstance(args, TrainingArguments):
        raise TypeError(
            f"args is a {type(args).__name__}; expected transformers' TrainingArguments."
        )
    if not isinstance(data, Mapping):
        raise TypeError(
            f"The data is a {type(data).__name__}; expected a mapping: by expert its own."
        )
    config = model.moelora_config
    names = config.choice_names if null_expert else config.expert_names or []
    check_names(data, names)
    if not data:
        raise ValueError(f"There is no data: give some of each of {', '.join(names)}.")
    for name, own in data.items():
        if hasattr(own, "__len__") and not len(own):
            raise ValueError(
                f"There is nothing to train {name!r} on: give some texts, or leave it out."
            )


def check_not_overridden(model: MixtureModel) -> None:
    """Raise ValueError inside `use_experts`."""
    if model.moelora.overridden:
        raise ValueError(
            "This cannot be done inside use_experts(), which forces experts: leave it first."
        )


def check_texts(name: str, texts: Any) -> None:
    """Raise TypeError unless `texts`, which the caller calls `name`, is a `Texts`."""
    if not isinstance(texts, Texts):
        raise TypeError(
            f"{name} is a {type(texts).__name__}; expected Texts (Texts.of(rows, tokenizer) makes "
            "them)."
        )
