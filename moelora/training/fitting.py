"""One stage of a recipe: which parts of a mixture train, on which rows, by the stock `Trainer`."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn
from transformers import Trainer, TrainingArguments

from ..core.experts import Factor
from ..core.model import MixtureModel, keeping_modes
from .collator import PadRouting
from .datasets import Texts


@dataclass(frozen=True)
class Trained:
    """What one run of the `Trainer` did.

    Args:
        loss: the language model's mean loss over the run.
        steps: of the optimizer.
        seconds: the run's time.
    """

    loss: float
    steps: int
    seconds: float


@contextmanager
def only_training(model: MixtureModel, experts: Sequence[str], routers: bool) -> Iterator[None]:
    """Inside, only the named experts and perhaps the routers train.

    Afterwards what was frozen is frozen again, what took gradients takes them again, and every
    submodule is in the mode that it was in. The base keeps its flags throughout.

    Args:
        model: the mixture.
        experts: the names of those that train, even if they are frozen.
        routers: whether the routers train.
    """
    mixture = model.moelora
    trained = {model.moelora_config.expert_index(name) for name in experts}
    others = frozenset(range(mixture.num_experts)) - trained
    factors = [
        (factor, factor.frozen_experts, _takes_gradient(factor)) for factor in mixture.factors()
    ]
    parameters = [
        (parameter, parameter.requires_grad)
        for router in mixture.routers.values()
        for parameter in router.parameters()
    ]
    try:
        for factor, _, _ in factors:
            _set_training(factor, others, True)
        for parameter, _ in parameters:
            parameter.requires_grad_(routers)
        with keeping_modes(model):
            yield
    finally:
        for factor, frozen, takes_gradient in factors:
            _set_training(factor, frozen, takes_gradient)
        for parameter, takes_gradient in parameters:
            parameter.requires_grad_(takes_gradient)
        model.zero_grad(set_to_none=True)


def fit(
    model: MixtureModel,
    data: Any,
    args: TrainingArguments,
    folder: str,
    collator: Callable | None,
    checkpoints: bool,
) -> Trained:
    """Train what takes gradients on `data` by a stock `Trainer`.

    Args:
        model: the mixture.
        data: Texts, or what else a `Trainer` takes.
        args: the Trainer's; a copy is used.
        folder: the subfolder of the output folder of `args` that the run writes into.
        collator: by default `PadRouting`.
        checkpoints: write those that `args` asks for, as its default does; else none.
    """
    own = copy.copy(args)
    own.output_dir = str(Path(args.output_dir or "") / folder)
    if not checkpoints:
        own.save_strategy = "no"  # type: ignore[assignment]
    if collator is None:
        collator = PadRouting(pad_token_id=getattr(model.config, "pad_token_id", None) or 0)
    rows = _without_prompts_at_token_level(model, data)
    start = time.perf_counter()
    with keeping_modes(model), _without_wrappers(model):
        output = Trainer(model, own, train_dataset=rows, data_collator=collator).train()
    return Trained(output.training_loss, output.global_step, time.perf_counter() - start)


def _trained_rows(factor: Factor) -> nn.Parameter | None:
    return factor.weight


def _takes_gradient(factor: Factor) -> bool:
    rows = _trained_rows(factor)
    return rows is None or rows.requires_grad


def _set_training(factor: Factor, frozen: frozenset[int], takes_gradient: bool) -> None:
    """Freeze exactly these experts' rows; the others take a gradient or not."""
    factor.set_frozen(frozen)
    rows = _trained_rows(factor)
    if rows is not None:
        rows.requires_grad_(takes_gradient)


def _without_prompts_at_token_level(model: MixtureModel, data: Any) -> Any:
    """`data` without router_mask where routers choose for single tokens, since they refuse it."""
    if model.moelora_config.routing_level == "sequence" or not isinstance(data, Texts):
        return data
    return Texts(
        [{key: value for key, value in row.items() if key != "router_mask"} for row in data.rows]
    )


@contextmanager
def _without_wrappers(model: MixtureModel) -> Iterator[None]:
    """Undo afterwards what accelerate wraps around `forward` for mixed precision.

    The next Trainer would wrap it once more.
    """
    before: Mapping[str, Any] = dict(model.__dict__)
    try:
        yield
    finally:
        for name in ("forward", "_original_forward"):
            model.__dict__.pop(name, None)
            if name in before:
                model.__dict__[name] = before[name]
