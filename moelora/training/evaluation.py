"""Choices used alone, and what a model predicts on labelled batches."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..config import NO_EXPERT
from ..core.losses import IGNORE
from ..core.model import MixtureModel, evaluating
from ..core.prompts import read_prompt


def predictions(model: Any, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The logits `[N, classes]` in fp32 and the labels `[N]` of all that a model should predict.

    A causal model predicts the label that follows each token, a classifier each row's label. As in
    training, a sequence router reads the prompt alone, and where a row has labels from its start,
    the first `router_prefix_tokens` tokens, which then count as no label.

    Raises:
        ValueError: no labels, or labels that do not fit the predictions.
    """
    if batch.get("labels") is None:
        raise ValueError("A batch has no labels: give what the models should predict.")
    inputs: dict[str, Any] = {name: value.to(model.device) for name, value in batch.items()}
    labels: Any = inputs.pop("labels")
    causal = isinstance(model, MixtureModel) and not model.is_classifier
    if causal and model.moelora.reads_prompts and labels.dim() == 2 and "router_mask" not in inputs:
        # Without positions: what is packed is refused in training alone.
        known = {**inputs, "labels": labels, "position_ids": None}
        prefix = model.moelora_config.router_prefix_tokens
        inputs["router_mask"], labels = read_prompt(
            known, None, prefix, is_classifier=False, answers=True
        )
    logits = model(**inputs).logits.float()
    if logits.dim() == 3 and labels.dim() == 2:
        logits = logits[:, :-1]
        labels = labels[:, 1:]
    logits = logits.reshape(-1, logits.shape[-1])
    labels = labels.reshape(-1)
    if len(logits) != len(labels):
        raise ValueError(
            f"The model makes {len(logits)} predictions for {len(labels)} labels: give each one."
        )
    counted = labels != IGNORE
    return logits[counted], labels[counted]


@torch.no_grad()
def scored(model: Any, batches: Iterable[Mapping[str, Tensor]]) -> tuple[float, Tensor, int]:
    """The mean loss over all labels of some batches, which predictions are right `[N]` bool, and
    among how many classes they are.

    Raises:
        ValueError: as `predictions`, or no label at all.
    """
    total = 0.0
    classes = 0
    right = [torch.empty(0, dtype=torch.bool)]
    with evaluating(model):
        for batch in batches:
            logits, labels = predictions(model, batch)
            total += float(nn.functional.cross_entropy(logits, labels, reduction="sum"))
            classes = logits.shape[1]
            right.append(logits.argmax(-1).cpu() == labels.cpu())
    found = torch.cat(right)
    if not len(found):
        raise ValueError("There is no label other than -100 in the batches: give some.")
    return total / len(found), found, classes


def check_not_overridden(model: MixtureModel) -> None:
    """Raise ValueError inside `use_experts`."""
    if model.moelora.overridden:
        raise ValueError("This cannot be done inside use_experts(): leave it first.")


def alone(model: MixtureModel, choice: str) -> dict[str, float]:
    """The weights by which `use_experts` uses one choice alone: an expert, or the null expert.

    Shared experts act beside it, as they do wherever a router chooses it.
    """
    config = model.moelora_config
    chosen = [] if choice == NO_EXPERT else [choice]
    weights = dict.fromkeys([*config.shared_expert_names, *chosen], 1.0)
    # Any expert with the weight 0 is the base alone.
    return weights or {config.routed_expert_names[0]: 0.0}
