"""MixDA (arXiv:2306.05406) as a recipe: domains from unlabelled text with the base as a
participant, then a task.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from transformers import TrainingArguments

from ..training.datasets import Texts
from ..training.fitting import Trained, check_arguments, fit, only_training, texts_of


@dataclass(frozen=True)
class MixdaReport:
    """What `train_mixda` did: each domain's run of the first stage, and the second stage's."""

    domains: dict[str, Trained]
    task: Trained

    @property
    def seconds(self) -> float:
        """Both stages together."""
        return self.task.seconds + sum(run.seconds for run in self.domains.values())


def train_mixda(
    model: Any,
    domains: Mapping[str, Any],
    task: Any,
    args: TrainingArguments,
    *,
    task_expert: str,
    general: Any = None,
    collator: Callable | None = None,
    checkpoints: bool = False,
) -> MixdaReport:
    """Train domain experts on unlabelled text beside the base, and then the gate and a task expert
    on labelled text.

    Stage 1, domain by domain: the domain's expert and the gate train on its texts, with all other
    experts banned, so the gate weighs that expert against the base alone (`null_expert`). Stage 2:
    all domain experts are frozen; gate and `task_expert` train on `task`, with every expert and the
    base to choose from. As in the paper (arXiv:2306.05406): the base takes part under the gate in
    both stages, the gate trains in both, each domain is trained apart, domain experts rest in stage
    2, and texts from elsewhere keep them off what they do not know. Different: experts are LoRAs
    wherever the mixture has them, not bottlenecks beside the FFNs of some layers; gates are the
    mixture's, a softmax of which the `num_experts_per_tok` best act, not an attention over outputs;
    one gate goes from domain to domain; the loss is the language model's, not of masked entities;
    in place of the squared distance to the base's activations, `general` has the language model's
    loss too and its rows are labelled as the base's (and the domain's as its expert's); the task
    expert is one of those under the gate.

    domains: by expert its texts. general: texts of no domain; without them the gate of stage 1
    learns from the language model's loss alone. The other arguments are `train_expert`'s; `args`
    holds for each run. Whatever happens, what is frozen is as before afterwards.

    Raises:
        ValueError, TypeError: no `null_expert`, one expert a token (which weighs nothing), unknown
        experts, a
            task_expert that is a domain's, no texts, texts shorter than the prompt that a sequence
            router reads, no `TrainingArguments`, or inside `use_experts`.
    """
    parts = _checked(model, domains, task, args, task_expert, general)
    names, runs = model.moelora_config.expert_names, {}
    for name in domains:
        texts = parts[name]
        if general is not None:
            base = len(names)  # the number of no expert
            texts = Texts.joined([texts.labelled(names.index(name)), parts[None].labelled(base)])
        others = [other for other in names if other != name]
        with only_training(model, [name], routers=True), model.use_experts(ban=others):
            runs[name] = fit(model, texts, args, f"domains/{name}", collator, checkpoints)
    with only_training(model, [task_expert], routers=True):
        last = fit(model, parts[task_expert], args, f"task/{task_expert}", collator, checkpoints)
    return MixdaReport(runs, last)


def _checked(
    model: Any, domains: Mapping[str, Any], task: Any, args: Any, task_expert: str, general: Any
) -> dict[str | None, Texts]:
    """All texts without labels for the routers: by domain, the task's by its expert, the general
    ones by None.
    """
    check_arguments(model, domains, args, base=False)
    check_arguments(model, {task_expert: task}, args, base=False)
    config = model.moelora_config
    if task_expert in domains:
        raise ValueError(
            f"task_expert={task_expert!r} is a domain's expert, which is frozen then: name another one."
        )
    if not config.null_expert:
        raise ValueError(
            "MixDA weighs each expert against the base: make the mixture with null_expert=True."
        )
    if config.num_experts_per_tok < 2:
        raise ValueError(
            f"num_experts_per_tok={config.num_experts_per_tok} chooses an expert or the base, and where the base is "
            "chosen nothing learns; MixDA weighs both: use num_experts_per_tok=2 or more."
        )
    parts: dict[str | None, Texts] = {name: texts_of(name, own) for name, own in domains.items()}
    parts[task_expert] = texts_of(task_expert, task)
    if general is not None:
        parts[None] = texts_of("general", general)
        if not len(parts[None]):
            raise ValueError("general has no texts: give some, or leave it out.")
    for name, texts in parts.items():
        _check_length(config, "general" if name is None else name, texts)
    return {name: texts.unlabelled() for name, texts in parts.items()}


def _check_length(config: Any, name: str, texts: Texts) -> None:
    """Raise where no text of these has a token left to learn, once a sequence router has read its
    prompt.
    """
    read = config.router_prefix_tokens if config.routing_level == "sequence" else 0
    if all("router_mask" not in row and len(row["input_ids"]) <= read for row in texts.rows):
        raise ValueError(
            f"The texts of {name!r} have no prompt and {max(len(row['input_ids']) for row in texts.rows)} tokens at "
            f"most, and a sequence router reads the first router_prefix_tokens={read}, which then take no loss: give "
            "longer texts, or a mixture with a smaller router_prefix_tokens."
        )
