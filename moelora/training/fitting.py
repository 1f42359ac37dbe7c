"""One stage of a recipe: which parts of a mixture train, on which rows, by the stock `Trainer`."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
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
    """Inside, of the mixture only these experts (frozen ones too) and perhaps the routers train.

    Afterwards what was frozen is so again, and what took gradients takes them again.
    """
    mixture = model.moelora
    trained = {model.moelora_config.expert_index(name) for name in experts}
    others = frozenset(range(mixture.num_experts)) - trained
    before = [
        (factor, factor.frozen_experts, factor.weight is None or factor.weight.requires_grad)
        for factor in mixture.factors()
    ]
    try:
        _set_training((factor, others, True) for factor, _, _ in before)
        with routers_training(model, routers):
            yield
    finally:
        _set_training(before)
        model.zero_grad(set_to_none=True)


@contextmanager
def routers_training(model: MixtureModel, train: bool) -> Iterator[list[nn.Parameter]]:
    """The routers' parameters, which inside train or not; then their gradients are as before."""
    before = [(p, p.requires_grad, p.grad) for p in model.moelora.routers.parameters()]
    try:
        yield [parameter.requires_grad_(train) for parameter, _, _ in before]
    finally:
        for parameter, takes_gradient, gradient in before:
            parameter.requires_grad_(takes_gradient)
            parameter.grad = gradient


def fit(
    model: MixtureModel,
    data: Any,
    args: TrainingArguments,
    folder: str,
    collator: Callable | None,
    checkpoints: bool,
) -> Trained:
    """Train what takes gradients on `data`, which a stock `Trainer` takes.

    It writes into the subfolder `folder` of the output folder, with `checkpoints` those that `args`
    asks for, as its default does; else none.
    """
    own = copy.copy(args)
    own.output_dir = str(Path(args.output_dir or "") / folder)
    if not checkpoints:
        own.save_strategy = "no"  # type: ignore[assignment]
    if collator is None:
        collator = PadRouting(pad_token_id=getattr(model.config, "pad_token_id", None) or 0)
    if isinstance(data, Texts) and model.moelora.by_token:
        # Routers that choose for single tokens refuse it.
        data = data.without("router_mask")
    before = dict(model.__dict__)
    start = time.perf_counter()
    try:
        with keeping_modes(model):
            output = Trainer(model, own, train_dataset=data, data_collator=collator).train()
    finally:
        # accelerate wraps `forward` for mixed precision; the next Trainer would wrap it once more.
        for name in ("forward", "_original_forward"):
            model.__dict__.pop(name, None)
            if name in before:
                model.__dict__[name] = before[name]
    return Trained(output.training_loss, output.global_step, time.perf_counter() - start)


def _set_training(factors: Iterable[tuple[Factor, frozenset[int], bool]]) -> None:
    """Freeze exactly these experts' rows in each factor; the others take a gradient or not."""
    for factor, frozen, takes_gradient in factors:
        factor.set_frozen(frozen)
        if factor.weight is not None:
            factor.weight.requires_grad_(takes_gradient)
