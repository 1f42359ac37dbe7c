"""What the tests of recipes share: arguments for short runs, and what moved in a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import TrainingArguments

from moelora.training import PadRouting, Texts


def arguments(folder: Path, **changes: Any) -> TrainingArguments:
    """A few quick steps on the CPU, logged to nobody."""
    given = {
        "output_dir": str(folder / "runs"),
        "use_cpu": True,
        "report_to": [],
        "disable_tqdm": True,
        "logging_strategy": "no",
        "per_device_train_batch_size": 8,
        "learning_rate": 2e-2,
        "lr_scheduler_type": "constant",
        "max_steps": 2,
        "seed": 7,
        "dataloader_pin_memory": False,
        **changes,
    }
    return TrainingArguments(**given)


def bits(model: Any) -> dict[str, Tensor]:
    """Every tensor of the model: each expert's factors by `expert.<name>.…`, the rest by their own
    names.
    """
    state = torch.nn.Module.state_dict(model)
    found = {
        name: tensor.clone()
        for name, tensor in state.items()
        if not name.startswith("moelora.sites.")
    }
    for name, factor in model.moelora.named_modules():
        if hasattr(factor, "expert_rows"):
            for number, expert in enumerate(model.moelora_config.expert_names):
                for i, rows in enumerate(factor.expert_rows(number)):
                    found[f"expert.{expert}.{name}.{i}"] = factor.stacked().detach()[rows].clone()
    return found


def moved(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
    """The parts of which a bit changed: "expert.<name>", "moelora.routers", "moelora.load" or
    "base".
    """
    assert before.keys() == after.keys()
    return {_part(name) for name, tensor in before.items() if not torch.equal(tensor, after[name])}


def _part(name: str) -> str:
    return ".".join(name.split(".")[:2]) if name.startswith(("expert.", "moelora.")) else "base"


def of_expert(found: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    """One expert's part of `bits`."""
    return {key: tensor for key, tensor in found.items() if key.startswith(f"expert.{name}.")}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(tensor, other[name]) for name, tensor in one.items()
    )


def state(model: Any) -> tuple:
    """What is frozen, what takes gradients, and the mode: what recipes leave as it was."""
    factors = [
        (factor.frozen_experts, None if factor.rows is None else factor.rows.requires_grad)
        for factor in model.moelora.factors()
    ]
    flags = [
        (name, p.requires_grad)
        for name, p in model.named_parameters()
        if "moelora.sites" not in name
    ]
    return factors, flags, model.training, model.moelora.forcing, "forward" in model.__dict__


@torch.no_grad()
def loss(model: Any, texts: Texts, expert: str | None = None) -> float:
    """The mean loss of the texts with one expert, with the base alone ("(base)"), or as the routers
    choose.
    """
    level, rows = model.moelora_config.routing_level, texts.rows
    if level == "token" or expert is not None:
        rows = [{key: row[key] for key in ("input_ids", "labels")} for row in rows]
    batch = PadRouting()(rows)
    if expert is None:
        return float(model(**batch).loss)
    named = {model.moelora_config.expert_names[0]: 0.0} if expert == "(base)" else expert
    with model.use_experts(named):
        return float(model(**batch).loss)


class Broken:
    """A collator that fails at its `last` batch."""

    def __init__(self, last: int):
        self.left, self.pad = last, PadRouting()

    def __call__(self, rows: list) -> dict:
        self.left -= 1
        if not self.left:
            raise RuntimeError("the disk is full")
        return self.pad(rows)
