"""Recipes for experts and gate on tasks: one expert after another and then the gate, or everything
together.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from transformers import TrainingArguments

from ..config import NO_EXPERT
from ..validation import check_choice
from .datasets import Texts
from .fitting import Trained, check_arguments, fit, only_training, texts_of
from .gate import GateReport, check_options, labelled_texts, train_gate
from .oracle import OracleLabels, check_texts, oracle_targets

LABELS = ("task", "oracle")


@dataclass(frozen=True)
class StagesReport:
    """What `train_in_stages` did: each expert's run, the gate's, and with labels="oracle" what it
    was trained on.
    """

    experts: dict[str, Trained]
    gate: GateReport
    oracle: OracleLabels | None = None

    @property
    def seconds(self) -> float:
        """All stages together."""
        return self.gate.seconds + sum(run.seconds for run in self.experts.values())


def train_expert(
    model: Any,
    name: str,
    data: Any,
    args: TrainingArguments,
    *,
    collator: Callable | None = None,
    checkpoints: bool = False,
) -> float:
    """Train the expert `name` alone on its data, used for every token with weight 1; returns the
    seconds.

    The routers and all other experts keep their bits; of the base train what trains anyway
    (`modules_to_save`). One that is frozen trains all the same, and is frozen again afterwards.
    data: Texts, or what else a `Trainer` takes. args: for a stock `Trainer`, which uses the
    subfolder of the expert's name. collator: by default `PadRouting`. checkpoints: write those that
    `args` asks for. Optimizers of before do not know the model's parameters any more.

    Raises:
        ValueError, TypeError: an unknown expert, no data, no `TrainingArguments`, or inside
        `use_experts`.
    """
    check_arguments(model, {name: data}, args, base=False)
    return _train_expert(model, name, data, args, collator, checkpoints).seconds


def train_in_stages(
    model: Any,
    data: Mapping[str, Any],
    args: TrainingArguments,
    *,
    gate: Mapping[str, Any] | None = None,
    labels: str = "task",
    collator: Callable | None = None,
    checkpoints: bool = False,
) -> StagesReport:
    """Train each expert alone on its own data (`train_expert`), and then the gate on all of it
    (`train_gate`).

    data: by expert its Texts, or a dataset with input_ids and labels, whose prompt is what comes
    before the labels; with `null_expert` also of "(base)", of which the gate alone learns. labels:
    what the gate is told is each text's
    expert: "task", the one whose data it is, or "oracle", the one with the lowest loss on it
    (`oracle_targets`).
    gate: what `train_gate` takes. All else is as in `train_expert`. Where a stage fails, what is
    frozen is as before, and the experts that were trained are.

    Raises:
        ValueError, TypeError: as `train_expert` and `train_gate`, before anything trains.
    """
    check_choice("labels", labels, LABELS)
    check_arguments(model, data, args, base=True)
    texts = {name: texts_of(name, own) for name, own in data.items()}
    labelled = labelled_texts(model, texts)
    options = {"seed": args.seed, **(gate or {})}
    # Found now, and not once the experts have trained.
    check_options(**options)
    if labels == "oracle":
        check_texts(model, labelled)
    runs = {
        name: _train_expert(model, name, own, args, collator, checkpoints)
        for name, own in data.items()
        if name != NO_EXPERT
    }
    found = None
    if labels == "oracle":
        found = oracle_targets(model, labelled, batch_size=args.per_device_eval_batch_size)
        labelled = labelled.labelled(found.targets)
    return StagesReport(runs, train_gate(model, labelled, **options), found)


def train_jointly(
    model: Any,
    data: Mapping[str, Any],
    args: TrainingArguments,
    *,
    collator: Callable | None = None,
    expert_targets: bool = True,
    checkpoints: bool = False,
) -> Trained:
    """Train experts and routers together on all data, mixed, by one stock `Trainer`.

    expert_targets: tell the routers whose data each row is, beside the language model's loss
    (`expert_target_loss_coef`); else they learn from that loss alone. What is frozen stays so.
    data, collator, checkpoints: as in `train_in_stages`.

    Raises:
        ValueError, TypeError: unknown experts, no data, no `TrainingArguments`, or inside
        `use_experts`.
    """
    check_arguments(model, data, args, base=True)
    names = model.moelora_config.choice_names
    parts = {name: texts_of(name, own) for name, own in data.items()}
    if expert_targets:
        texts = Texts.joined([own.labelled(names.index(name)) for name, own in parts.items()])
    else:
        texts = Texts.joined(list(parts.values())).unlabelled()
    return fit(model, texts, args, "jointly", collator, checkpoints)


def _train_expert(
    model: Any,
    name: str,
    data: Any,
    args: TrainingArguments,
    collator: Callable | None,
    checkpoints: bool,
) -> Trained:
    data = data.unlabelled() if isinstance(data, Texts) else data
    with only_training(model, [name], routers=False), model.use_experts(name):
        return fit(model, data, args, name, collator, checkpoints)
