"""Labels by oracle: each text's expert is the one with the lowest loss on it."""

from __future__ import annotations

import hashlib
import inspect
import json
import math
from contextlib import suppress
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..checkpoint.atomic import atomic_files
from ..core.losses import IGNORE
from ..core.model import MixtureModel, evaluating
from ..validation import check_integer, check_number
from .datasets import Texts, check_texts, padded_batch
from .evaluation import alone


@dataclass(frozen=True)
class OracleLabels:
    """What `oracle_targets` found.

    Args:
        targets: `[n]` int64, each text's best choice, −100 for none.
        losses: `[n, choices]` fp32, each text's mean loss over its labels with each choice.
        choice_names: the routed experts, and with `null_expert` after them "(base)".
    """

    targets: Tensor
    losses: Tensor
    choice_names: list[str]


def oracle_targets(
    model: MixtureModel,
    texts: Texts,
    *,
    batch_size: int = 8,
    cache: str | PathLike[str] | None = None,
    margin: float = 0.0,
) -> OracleLabels:
    """Label each text by the choice with the lowest mean loss on its target tokens.

    Each expert is used alone, with weight 1; with `null_expert` the base alone is one more choice.
    Shared experts act beside all of them.
    Ties go to the lowest number. What it returns is for
    `train_gate(model, texts.labelled(labels.targets))`.

    Args:
        model: the mixture.
        texts: what to label.
        batch_size: texts a forward pass.
        cache: a file to keep the losses in. It is read only if texts, experts and base are those
            that made it, and written anew otherwise.
        margin: texts whose two lowest losses are closer than this get −100, no label.

    Raises:
        ValueError: no texts, one without a target token to predict, or a loss that is not finite.
        TypeError: a classifier, or no Texts.
    """
    check_integer("batch_size", batch_size, 1)
    check_number("margin", margin, 0.0, math.inf)
    check_oracle_texts(model, texts)
    if cache is None:
        losses = _losses(model, texts, batch_size)
    else:
        losses = _cached_losses(model, texts, batch_size, Path(cache))
    targets = losses.argmin(1)
    if losses.shape[1] > 1:
        lowest = losses.topk(2, dim=1, largest=False).values
        targets = targets.masked_fill(lowest[:, 1] - lowest[:, 0] < margin, IGNORE)
    return OracleLabels(targets, losses, model.moelora_config.choice_names)


def check_oracle_texts(model: MixtureModel, texts: Texts) -> None:
    """Raise where `oracle_targets` could not label these texts."""
    if model.is_classifier:
        raise TypeError("oracle_targets needs target tokens, and a classifier has none.")
    check_texts("texts", texts)
    for number, row in enumerate(texts.rows):
        # Nothing predicts the first token.
        if not bool((row["labels"][1:] != IGNORE).any()):
            raise ValueError(f"Row {number} has no target token to predict: leave it out.")


@torch.no_grad()
def _losses(model: MixtureModel, texts: Texts, batch_size: int) -> Tensor:
    """Each text's mean loss with each choice, `[n, choices]` fp32 on the CPU."""
    names = model.moelora_config.choice_names
    rows = [{key: row[key] for key in ("input_ids", "labels")} for row in texts.rows]
    # Texts of one length stand together.
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]["input_ids"]))
    losses = torch.empty(len(rows), len(names))
    with evaluating(model):
        for begin in range(0, len(order), batch_size):
            numbers = order[begin : begin + batch_size]
            batch = padded_batch([rows[i] for i in numbers], model.device)
            for choice, name in enumerate(names):
                with model.use_experts(alone(model, name)):
                    losses[numbers, choice] = _mean_losses(model, **batch).cpu()
    for row, choice in (~losses.isfinite()).nonzero().tolist():
        loss = float(losses[row, choice])
        raise ValueError(f"The loss with {names[choice]!r} is {loss} on row {row}.")
    return losses


def _mean_losses(model: MixtureModel, labels: Tensor, **inputs: Tensor) -> Tensor:
    """The mean loss of each row over its labels, `[batch]` fp32."""
    targets = labels[:, 1:]
    asked = (targets != IGNORE).any(0).nonzero().flatten()
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        # A prompt's logits are most of the memory, and nobody asks for them.
        logits = model(**inputs, logits_to_keep=asked).logits
    else:
        logits = model(**inputs).logits[:, asked]
    targets = targets[:, asked].to(logits.device)
    each = nn.functional.cross_entropy(
        logits.float().transpose(1, 2), targets, ignore_index=IGNORE, reduction="none"
    )
    return each.sum(1) / (targets != IGNORE).sum(1)


def _cached_losses(model: MixtureModel, texts: Texts, batch_size: int, path: Path) -> Tensor:
    """The losses in the file, if they are whole and of this model and these texts; else new ones,
    which are put there.
    """
    if path.is_dir():
        raise ValueError(f"cache={str(path)!r} is a folder; expected a file's path.")
    key = _key(model, texts)
    with suppress(OSError, SafetensorError), safe_open(path, framework="pt") as file:
        losses = file.get_tensor("losses")
        if file.metadata() == {"key": _hash(key, losses=losses)}:
            return losses
    # An error here comes before the work, not after it.
    path.parent.mkdir(parents=True, exist_ok=True)
    losses = _losses(model, texts, batch_size)
    with atomic_files(path.parent, commit=path.name) as staging:
        metadata = {"key": _hash(key, losses=losses)}
        save_file({"losses": losses}, staging / path.name, metadata=metadata)
    return losses


def _key(model: MixtureModel, texts: Texts) -> str:
    """A hash of what the losses depend on: texts, experts, and the base's weights and config."""
    own = model.moelora_config
    config = model.config.to_dict() | {"choice_names": own.choice_names}
    config |= {"expert_activation": own.expert_activation, "placement": own.expert_placement}
    for name in ("_name_or_path", "transformers_version"):
        config.pop(name, None)
    state = nn.Module.state_dict(model)
    tensors = {name: tensor for name, tensor in state.items() if not model.moelora.owns(name)}
    for i, row in enumerate(texts.rows):
        tensors |= {f"{i} {name}": row[name] for name in ("input_ids", "labels")}
    for number in range(model.moelora.num_experts):
        for linear, factors in model.moelora.expert(number).items():
            scaled = f"{number} {linear} {own.scaling_of(linear)[number]}"
            tensors |= {f"{scaled} A": factors.A, f"{scaled} B": factors.B}
    return _hash(json.dumps(config, sort_keys=True, default=str), **tensors)


def _hash(about: str, /, **tensors: Tensor) -> str:
    digest: Any = hashlib.sha256(about.encode())
    for name, tensor in tensors.items():
        if tensor.is_meta:
            raise ValueError(f"{name} is not in memory, so no cache can be checked: leave it out.")
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
