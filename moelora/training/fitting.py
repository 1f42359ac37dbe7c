"""One stage of a recipe: which parts of a mixture train, on which rows, by the stock `Trainer`."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer, TrainingArguments

from ..core.losses import IGNORE
from .collator import PadRouting
from .datasets import Texts


@dataclass(frozen=True)
class Trained:
    """What one run of the `Trainer` did: its mean loss of the language model, its optimizer steps
    and seconds.
    """

    loss: float
    steps: int
    seconds: float


@contextmanager
def only_training(model: Any, experts: list[str], routers: bool) -> Iterator[None]:
    """While inside, of the mixture these experts train, and the routers or not; then as before, but
    for values.
    """
    config, frozen, training = model.moelora_config, model._frozen(), model.training
    trained = {config.expert_index(name) for name in experts}
    flags = [factor.rows is None or factor.rows.requires_grad for factor in model.moelora.factors()]
    of_routers = [
        (parameter, parameter.requires_grad) for parameter in model.moelora.routers.parameters()
    ]
    try:
        model._set_frozen(frozenset(range(config.num_experts)) - trained)
        for factor in model.moelora.factors():
            if factor.rows is not None:
                factor.rows.requires_grad_(True)
        for parameter, _ in of_routers:
            parameter.requires_grad_(routers)
        yield
    finally:
        model._set_frozen(frozen)
        for factor, trains in zip(model.moelora.factors(), flags):
            if factor.rows is not None:
                factor.rows.requires_grad_(trains)
        for parameter, trains in of_routers:
            parameter.requires_grad_(trains)
        model.zero_grad(set_to_none=True)
        model.train(training)


def fit(
    model: Any,
    data: Any,
    args: TrainingArguments,
    folder: str,
    collator: Callable | None,
    checkpoints: bool,
) -> Trained:
    """Train what takes gradients on `data` by a stock `Trainer` with a copy of `args`, below whose
    folder it writes.

    collator: by default `PadRouting`. checkpoints: write those that `args` asks for (the default of
    `TrainingArguments` does), else none.
    """
    own = copy.copy(args)
    own.output_dir = str(Path(args.output_dir or "") / folder)
    if not checkpoints:
        own.save_strategy = "no"  # type: ignore[assignment]
    if collator is None:
        pad = getattr(model.config, "pad_token_id", None)
        collator = PadRouting(pad_token_id=0 if pad is None else pad)
    start, before = time.perf_counter(), dict(model.__dict__)
    training = model.training
    try:
        trainer = Trainer(
            model,
            own,
            train_dataset=_without_prompts_at_token_level(model, data),
            data_collator=collator,
        )
        output = trainer.train()
    finally:
        _forget_wrappers(model, before)
        model.train(training)
    return Trained(output.training_loss, output.global_step, time.perf_counter() - start)


def texts_of(name: str, data: Any) -> Texts:
    """`data` as Texts: what it is, or a dataset's rows with input_ids `[n]` and perhaps labels and
    router_mask `[n]`.

    The prompt of such a row is its router_mask, else what comes before its first label; padding is
    left out.

    Raises:
        TypeError, ValueError: no dataset of such rows, by the number of the row.
    """
    if isinstance(data, Texts):
        return data
    if (
        isinstance(data, (str, Mapping))
        or not hasattr(data, "__len__")
        or not hasattr(data, "__getitem__")
    ):
        raise TypeError(
            f"The data of {name!r} is a {type(data).__name__}; expected Texts (Texts.of(rows, tokenizer) makes them) "
            "or a dataset with a length, whose rows have input_ids."
        )
    return Texts([_row(name, number, data[number]) for number in range(len(data))])


def check_arguments(model: Any, data: Mapping[str, Any], args: Any, base: bool) -> None:
    """Raise before anything trains where a recipe cannot use its data or `args`; base: whether
    "(base)" may have data.

    Raises:
        ValueError, TypeError: unknown experts, nothing to train on, no `TrainingArguments`, or
        inside `use_experts`.
    """
    if model.moelora.forcing is not None:
        raise ValueError(
            "A recipe decides itself which experts are used, so leave use_experts() first."
        )
    if not isinstance(args, TrainingArguments):
        raise TypeError(
            f"args is a {type(args).__name__}; expected transformers' TrainingArguments."
        )
    if not isinstance(data, Mapping):
        raise TypeError(
            f"The data is a {type(data).__name__}; expected a mapping: by expert its own."
        )
    config = model.moelora_config
    names = config.choice_names if base else config.expert_names
    unknown = sorted(str(name) for name in data if name not in names)
    if unknown:
        raise ValueError(
            f"There is no expert {', '.join(map(repr, unknown))}. The choices are: {', '.join(names)}."
        )
    if not data:
        raise ValueError(f"There is no data: give some of each of {', '.join(names)}.")
    for name, own in data.items():
        if hasattr(own, "__len__") and not len(own):
            raise ValueError(
                f"There is nothing to train {name!r} on: give some texts, or leave it out."
            )


def _row(name: str, number: int, row: Any) -> dict[str, Tensor]:
    """A dataset's row as Texts have them."""
    if not isinstance(row, Mapping) or "input_ids" not in row:
        found = sorted(row) if isinstance(row, Mapping) else type(row).__name__
        raise ValueError(
            f"Row {number} of {name!r} has {found}; expected input_ids, and labels where not all are."
        )
    made = {"input_ids": torch.as_tensor(row["input_ids"])}
    made["labels"] = torch.as_tensor(row.get("labels", made["input_ids"]))
    if made["labels"].shape != made["input_ids"].shape or made["labels"].dim() != 1:
        raise ValueError(
            f"Row {number} of {name!r} has labels of shape {list(made['labels'].shape)} and input_ids of shape "
            f"{list(made['input_ids'].shape)}; expected [n] both."
        )
    if "router_mask" in row:
        made["router_mask"] = torch.as_tensor(row["router_mask"]).bool()
    elif bool((made["labels"] != IGNORE).any()):
        prompt = (made["labels"] != IGNORE).cumsum(0) == 0
        if "attention_mask" in row:
            prompt = prompt & torch.as_tensor(row["attention_mask"]).bool()
        if bool(prompt.any()):
            made["router_mask"] = prompt
    if "attention_mask" in row:
        attended = torch.as_tensor(row["attention_mask"]).bool()
        made = {key: value[attended] for key, value in made.items()}
    return made


def _without_prompts_at_token_level(model: Any, data: Any) -> Any:
    """`data`, of which routers of single tokens are told no prompt, since they refuse one."""
    if model.moelora_config.routing_level == "sequence" or not isinstance(data, Texts):
        return data
    return Texts(
        [{key: value for key, value in row.items() if key != "router_mask"} for row in data.rows]
    )


def _forget_wrappers(model: Any, before: Mapping[str, Any]) -> None:
    """Undo what accelerate wraps around `forward` for mixed precision: the next Trainer would wrap
    that once more.
    """
    for name in ("forward", "_original_forward"):
        model.__dict__.pop(name, None)
        if name in before:
            model.__dict__[name] = before[name]
