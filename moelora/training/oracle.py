"""Labels by oracle: each text's expert is the one with the lowest loss on it."""

from __future__ import annotations

import hashlib
import inspect
import json
import math
import os
import tempfile
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..core.losses import IGNORE
from ..validation import check_integer, check_number
from .collator import PadRouting
from .datasets import Texts

# What no expert's loss depends on.
ROUTING = ("moelora.routers.", "moelora.load.")


@dataclass(frozen=True)
class OracleLabels:
    """targets: `[n]` int64, each text's best choice, −100 for none. losses: `[n, choices]` fp32,
    mean over its labels.

    choice_names: the experts, and with `null_expert` the base alone.
    """

    targets: Tensor
    losses: Tensor
    choice_names: list[str]


def oracle_targets(
    model: Any,
    texts: Texts,
    *,
    batch_size: int = 8,
    cache: str | PathLike[str] | None = None,
    margin: float = 0.0,
) -> OracleLabels:
    """Label each text by the expert with the lowest mean loss on its target tokens; ties go to the
    lowest number.

    Each expert is used alone, with weight 1, and with `null_expert` the base alone is one more
    choice. For `train_gate(model, texts.labelled(found.targets))`.
    cache: a file to keep the losses in; taken only if texts, experts and base are those that made
    it, else written anew. margin: texts whose best loss is not lower than the others by this much
    get −100, no label.

    Raises:
        ValueError, TypeError: a text without a target token to predict, a loss that is not finite,
        a classifier.
    """
    check_integer("batch_size", batch_size, 1)
    check_number("margin", margin, 0.0, math.inf)
    check_texts(model, texts)
    path = None if cache is None else Path(cache)
    key = "" if path is None else _key(model, texts)
    losses = None if path is None else _kept(path, key)
    if losses is None:
        if path is not None:
            # Found out before the work, not after it.
            path.parent.mkdir(parents=True, exist_ok=True)
        losses = _losses(model, texts, batch_size)
        if path is not None:
            _keep(path, key, losses)
    targets = losses.argmin(1)
    if losses.shape[1] > 1:
        two = losses.topk(2, dim=1, largest=False).values
        targets = targets.masked_fill(two[:, 1] - two[:, 0] < margin, IGNORE)
    return OracleLabels(targets, losses, model.moelora_config.choice_names)


def check_texts(model: Any, texts: Texts) -> None:
    """Raise where `oracle_targets` could not label these texts.

    Raises:
        ValueError, TypeError: a classifier, no texts, or one without a target token to predict.
    """
    if model.is_classifier:
        raise TypeError(
            "oracle_targets compares losses on target tokens, which a classifier has none of."
        )
    if not isinstance(texts, Texts):
        raise TypeError(
            f"texts is a {type(texts).__name__}; expected Texts (Texts.of(rows, tokenizer) makes them)."
        )
    if not len(texts):
        raise ValueError("There are no texts to label: give one at least.")
    for number, row in enumerate(texts.rows):
        # Nothing predicts the first token.
        if not bool((row["labels"][1:] != IGNORE).any()):
            raise ValueError(
                f"Row {number} has no target token to predict: leave it out, or give it a target."
            )


@torch.no_grad()
def _losses(model: Any, texts: Texts, batch_size: int) -> Tensor:
    """Each text's mean loss with each choice, `[n, choices]` fp32 on the CPU."""
    names = model.moelora_config.expert_names
    # The base alone is any expert with weight 0.
    choices = [{name: 1.0} for name in names] + [{names[0]: 0.0}] * model.moelora_config.null_expert
    order = sorted(range(len(texts)), key=lambda i: len(texts.rows[i]["input_ids"]))
    found, training = torch.empty(len(texts), len(choices)), model.training
    fields = ("input_ids", "labels")
    model.eval()
    try:
        for begin in range(0, len(order), batch_size):
            numbers = order[begin : begin + batch_size]
            batch = PadRouting()([{k: texts.rows[i][k] for k in fields} for i in numbers])
            for choice, used in enumerate(choices):
                with model.use_experts(used):
                    found[numbers, choice] = _mean_losses(model, batch).cpu()
    finally:
        model.train(training)
    for choice, name in enumerate(model.moelora_config.choice_names):
        if not bool(found[:, choice].isfinite().all()):
            row = int((~found[:, choice].isfinite()).nonzero()[0])
            raise ValueError(
                f"The loss with {name!r} is {float(found[row, choice])} on row {row}: look at its weights."
            )
    return found


def _mean_losses(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """The mean loss of each row over its labels, `[batch]` fp32."""
    ids, mask, labels = (
        batch[k].to(model.device) for k in ("input_ids", "attention_mask", "labels")
    )
    inputs = {"input_ids": ids, "attention_mask": mask}
    targets = labels[:, 1:]
    asked = (targets != IGNORE).any(0).nonzero().flatten()
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        # A prompt's logits are most of the memory, and nobody asks for them.
        logits = model(**inputs, logits_to_keep=asked).logits
    else:
        logits = model(**inputs).logits[:, asked]
    targets = targets[:, asked].to(logits.device)
    each = torch.nn.functional.cross_entropy(
        logits.float().transpose(1, 2), targets, ignore_index=IGNORE, reduction="none"
    )
    return each.sum(1) / (targets != IGNORE).sum(1)


def _key(model: Any, texts: Texts) -> str:
    """A hash of all that the losses depend on: token ids and labels, every expert, every weight of
    the base.
    """
    config, found = model.moelora_config, hashlib.sha256()
    about = {
        k: v
        for k, v in model.config.to_dict().items()
        if k not in ("_name_or_path", "transformers_version")
    }
    linears = [name for site in model.moelora.sites.values() for name in site.names]
    about["moelora"] = [
        config.choice_names,
        [[name, config.ranks_of(name), config.scaling_of(name)] for name in linears],
    ]
    found.update(json.dumps(about, sort_keys=True, default=str).encode())
    for row in texts.rows:
        for name in ("input_ids", "labels"):
            _add(found, name, row[name])
    for name, tensor in torch.nn.Module.state_dict(model).items():
        if not name.startswith(ROUTING):
            if tensor.device.type == "meta":
                raise ValueError(
                    f"{name} is not in memory, so a cache could not be told to be stale: leave cache out."
                )
            _add(found, name, tensor)
    return found.hexdigest()


def _add(found: Any, name: str, tensor: Tensor) -> None:
    found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
    found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())


def _sum_of(losses: Tensor) -> str:
    found = hashlib.sha256()
    _add(found, "losses", losses)
    return found.hexdigest()


def _kept(path: Path, key: str) -> Tensor | None:
    """The losses in the file, if it is there, whole, and of this key."""
    if path.is_dir():
        raise ValueError(f"cache={str(path)!r} is a folder; expected a file's path.")
    try:
        with safe_open(path, framework="pt") as file:
            about, losses = file.metadata() or {}, file.get_tensor("losses")
    except (OSError, SafetensorError):
        return None
    return losses if about.get("key") == key and about.get("sum") == _sum_of(losses) else None


def _keep(path: Path, key: str, losses: Tensor) -> None:
    """Write the file in one step: whoever reads it meanwhile finds the old one or the new one."""
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".oracle-") as folder:
        made = Path(folder) / "losses"
        save_file({"losses": losses}, made, metadata={"key": key, "sum": _sum_of(losses)})
        os.replace(made, path)
