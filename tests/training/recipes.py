"""What the tests of recipes share: arguments for short runs, and what moved in a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import TrainingArguments

from moelora.training import PadRouting, Texts
from moelora.training.evaluation import alone


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
    """Every tensor of the model: "expert.<name>.…", "routers.…", "load.…", and the base's."""
    mixture = model.moelora
    state = torch.nn.Module.state_dict(model)
    tensors = {name: tensor for name, tensor in state.items() if not mixture.owns(name)}
    for name, tensor in mixture.load.state_dict().items():
        tensors[f"load.{name}"] = tensor
    for router, module in mixture.routers.items():
        for name, tensor in module.state_dict().items():
            tensors[f"routers.{router}.{name}"] = tensor
    for number, expert in enumerate(model.moelora_config.expert_names):
        for linear, factors in mixture.expert(number).items():
            tensors[f"expert.{expert}.{linear}.A"] = factors.A
            tensors[f"expert.{expert}.{linear}.B"] = factors.B
    return {name: tensor.clone() for name, tensor in tensors.items()}


def moved(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
    """The parts of which a bit changed: "expert.<name>", "routers", "load" or "base"."""
    assert before.keys() == after.keys()
    return {_part(name) for name, tensor in before.items() if not torch.equal(tensor, after[name])}


def _part(name: str) -> str:
    first, second = name.split(".")[:2]
    if first == "expert":
        return f"expert.{second}"
    return first if first in ("routers", "load") else "base"


def of_expert(found: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    """One expert's part of `bits`."""
    return {key: tensor for key, tensor in found.items() if key.startswith(f"expert.{name}.")}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(tensor, other[name]) for name, tensor in one.items()
    )


def state(model: Any) -> tuple:
    """What is frozen, what takes gradients, and the modes: what recipes leave as it was."""
    mixture = model.moelora
    factors = [
        (factor.frozen_experts, [p.requires_grad for p in factor.parameters()])
        for factor in mixture.factors()
    ]
    base = [p.requires_grad for n, p in model.named_parameters() if not mixture.owns(n)]
    routers = [p.requires_grad for r in mixture.routers.values() for p in r.parameters()]
    modes = [module.training for module in model.modules()]
    return factors, base, routers, modes, mixture.overridden, "forward" in model.__dict__


@torch.no_grad()
def loss(model: Any, texts: Texts, expert: str | None = None) -> float:
    """The mean loss of the texts with one choice ("(base)" too), or as the routers choose."""
    level, rows = model.moelora_config.routing_level, texts.rows
    if level == "token" or expert is not None:
        rows = [{key: row[key] for key in ("input_ids", "labels")} for row in rows]
    batch = PadRouting()(rows)
    if expert is None:
        return float(model(**batch).loss)
    with model.use_experts(alone(model, expert)):
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
