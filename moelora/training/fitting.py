"""Experts and routers on tasks, by the stock `Trainer`: expert after expert and then the routers,
or all at once.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from transformers import Trainer, TrainingArguments

from ..config import NO_EXPERT
from ..core.experts import Factor
from ..core.model import MixtureModel, keeping_modes
from ..validation import check_choice, check_names
from .datasets import PadRouting, Texts, texts_of
from .evaluation import alone, check_not_overridden
from .gate import (
    GateReport,
    check_options,
    check_routers_learn,
    labelled_texts,
    routers_training,
    train_gate,
)
from .oracle import OracleLabels, check_oracle_texts, oracle_targets


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


@dataclass(frozen=True)
class StagesReport:
    """What `train_in_stages` did.

    Args:
        experts: each expert's run.
        gate: how the routers were trained.
        oracle: with labels="oracle", what they were trained on.
    """

    experts: dict[str, Trained]
    gate: GateReport
    oracle: OracleLabels | None = None

    @property
    def seconds(self) -> float:
        """All stages together."""
        return self.gate.seconds + sum(run.seconds for run in self.experts.values())


def train_expert(
    model: MixtureModel,
    name: str,
    data: Any,
    args: TrainingArguments,
    *,
    collator: Callable | None = None,
    checkpoints: bool = False,
) -> float:
    """Train one expert alone on its data, used for every token with weight 1.

    The routers and all other experts keep their bits; of the base only what trains anyway
    (`modules_to_save`) trains. A frozen expert trains all the same, and is frozen again afterwards.
    With `share_lora_A` only its B trains, since A belongs to the others too.
    Optimizers that were made before do not know the model's parameters any more.

    Args:
        model: the mixture.
        name: the expert.
        data: Texts, or what else a `Trainer` takes.
        args: for a stock `Trainer`, which writes into the subfolder of the expert's name.
        collator: by default `PadRouting`.
        checkpoints: write those that `args` asks for.

    Returns:
        The seconds that it took.

    Raises:
        ValueError: an unknown expert, no data, or inside `use_experts`.
        TypeError: no `TrainingArguments`.
    """
    check_arguments(model, {name: data}, args, null_expert=False)
    run = partial(fit, model, args=args, collator=collator, checkpoints=checkpoints)
    return _train_expert(model, name, data, run).seconds


def train_in_stages(
    model: MixtureModel,
    data: Mapping[str, Any],
    args: TrainingArguments,
    *,
    gate: Mapping[str, Any] | None = None,
    labels: str = "task",
    collator: Callable | None = None,
    checkpoints: bool = False,
) -> StagesReport:
    """Train each expert alone on its own data, and then the routers on all of it.

    This is `train_expert` for every expert, and `train_gate`. Where a stage fails, everything is
    frozen as it was before, and the experts of the stages before it stay trained.

    Args:
        model: the mixture.
        data: by expert its Texts, or a dataset with input_ids and labels, whose prompt is what
            comes before the labels. With `null_expert` also of "(base)", which the routers alone
            learn from.
        args: for each expert's run, as in `train_expert`.
        gate: the options of `train_gate`.
        labels: what the routers are told to choose for a text: "task", the expert whose data it
            is, or "oracle", the one with the lowest loss on it (`oracle_targets`).
        collator: by default `PadRouting`.
        checkpoints: write those that `args` asks for.

    Raises:
        ValueError, TypeError: as `train_expert` and `train_gate`, before anything trains.
    """
    check_choice("labels", labels, ("task", "oracle"))
    labelled = _labelled(model, data, args)
    options = {"seed": args.seed, **(gate or {})}
    # A mistake is found now, not when the experts have trained.
    check_options(**options)
    if labels == "oracle":
        check_oracle_texts(model, labelled)
    run = partial(fit, model, args=args, collator=collator, checkpoints=checkpoints)
    experts = [name for name in data if name != NO_EXPERT]
    runs = {name: _train_expert(model, name, data[name], run) for name in experts}
    oracle = None
    if labels == "oracle":
        oracle = oracle_targets(model, labelled, batch_size=args.per_device_eval_batch_size)
        labelled = labelled.labelled(oracle.targets)
    return StagesReport(runs, train_gate(model, labelled, **options), oracle)


def train_jointly(
    model: MixtureModel,
    data: Mapping[str, Any],
    args: TrainingArguments,
    *,
    collator: Callable | None = None,
    expert_targets: bool = True,
    checkpoints: bool = False,
) -> Trained:
    """Train experts and routers together on all data, mixed, by one stock `Trainer`.

    What is frozen stays so.

    Args:
        model: the mixture.
        data: as in `train_in_stages`.
        args: for the `Trainer`.
        collator: by default `PadRouting`.
        expert_targets: tell the routers whose data each row is, by a loss beside the language
            model's (`expert_target_loss_coef`); else they learn from the latter alone.
        checkpoints: write those that `args` asks for.

    Raises:
        ValueError: unknown experts, no data, or inside `use_experts`.
        TypeError: no `TrainingArguments`, or data of another type.
    """
    texts = _labelled(model, data, args)
    texts = texts if expert_targets else texts.unlabelled()
    return fit(model, texts, args, "jointly", collator, checkpoints)


def check_arguments(model: MixtureModel, data: Any, args: Any, null_expert: bool) -> None:
    """Raise where a recipe cannot use its data, by expert (perhaps "(base)" too), or its `args`."""
    check_not_overridden(model)
    if not isinstance(args, TrainingArguments):
        kind = type(args).__name__
        raise TypeError(f"args is a {kind}; expected transformers' TrainingArguments.")
    if not isinstance(data, Mapping):
        raise TypeError(f"The data is a {type(data).__name__}; expected a mapping by expert.")
    config = model.moelora_config
    names = config.choice_names if null_expert else config.expert_names or []
    check_names(data, names)
    if not data:
        raise ValueError(f"There is no data: give some of each of {', '.join(names)}.")
    for name, own in data.items():
        if hasattr(own, "__len__") and not len(own):
            raise ValueError(f"There is nothing to train {name!r} on: give some, or leave it out.")


def _labelled(model: MixtureModel, data: Mapping[str, Any], args: TrainingArguments) -> Texts:
    """All data, checked, labelled by whose it is."""
    check_arguments(model, data, args, null_expert=True)
    return labelled_texts(model, {name: texts_of(name, own) for name, own in data.items()})


def _train_expert(
    model: MixtureModel, name: str, data: Any, run: Callable[..., Trained]
) -> Trained:
    data = data.unlabelled() if isinstance(data, Texts) else data
    with only_training(model, name, routers=False), model.use_experts(alone(model, name)):
        return run(data, folder=name)


@contextmanager
def only_training(model: MixtureModel, expert: str, routers: bool) -> Iterator[None]:
    """Inside, of the mixture only this expert (a frozen one too) and perhaps the routers train.

    Afterwards what was frozen is so again, and what took gradients takes them again.
    """
    if routers:
        check_routers_learn(model)
    mixture = model.moelora
    trained = model.moelora_config.expert_index(expert)
    others = frozenset(range(mixture.num_experts)) - {trained}
    with ExitStack() as stack:
        stack.callback(model.zero_grad)
        for factor in mixture.factors():
            trains = factor.weight is None or factor.weight.requires_grad
            stack.callback(_set_training, factor, factor.frozen_experts, trains)
            _set_training(factor, others, True)
        stack.enter_context(routers_training(model, routers))
        yield


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
    if isinstance(data, Texts) and not model.moelora.reads_prompts:
        # Routers that read no prompts refuse it.
        data = data.without("router_mask")
    wrapped = ("forward", "_original_forward")
    before = {name: value for name, value in vars(model).items() if name in wrapped}
    start = time.perf_counter()
    try:
        with keeping_modes(model):
            output = Trainer(model, own, train_dataset=data, data_collator=collator).train()
    finally:
        # accelerate wraps `forward` for mixed precision; the next Trainer would wrap it once more.
        for name in wrapped:
            vars(model).pop(name, None)
        vars(model).update(before)
    return Trained(output.training_loss, output.global_step, time.perf_counter() - start)


def _set_training(factor: Factor, frozen: frozenset[int], takes_gradient: bool) -> None:
    """Freeze exactly these experts' rows in a factor; the others take a gradient or not."""
    factor.set_frozen(frozen)
    if factor.weight is not None:
        factor.weight.requires_grad_(takes_gradient)
