"""MixDA (arXiv:2306.05406): domain experts from unlabelled text beside the base, then a task."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from transformers import TrainingArguments

from ..config import MoeLoraConfig
from ..core.model import MixtureModel
from ..training.datasets import Texts, texts_of
from ..training.fitting import Trained, check_arguments, fit, only_training
from ..validation import check_names


@dataclass(frozen=True)
class MixdaReport:
    """What `train_mixda` did.

    Args:
        domains: each domain's run of the first stage.
        task: the run of the second stage.
    """

    domains: dict[str, Trained]
    task: Trained

    @property
    def seconds(self) -> float:
        """Both stages together."""
        return self.task.seconds + sum(run.seconds for run in self.domains.values())


def mixda_config(
    names: Sequence[str], blocks: Sequence[str], layers: int | Sequence[int], **fields: Any
) -> MoeLoraConfig:
    """The paper's mixture: bottlenecks with a GELU in parallel with the FFNs of a few layers, and
    the base as one more choice.

    Args:
        names: of the experts, one a domain and the task's.
        blocks: what the FFNs are called in this base, as `target_blocks`: ["mlp"], or ["fc1->fc2"]
            where they are no modules of their own.
        layers: the numbers of the layers that have experts; the authors' scripts take 7 and 11 of
            the 24 of a large encoder.
        fields: further ones of `MoeLoraConfig`, such as r (the authors' bottleneck is a sixteenth
            of the FFN's width), or others than these.

    Raises:
        ValueError, TypeError: as `MoeLoraConfig`.
    """
    usual = {
        "num_experts": len(names),
        "expert_names": list(names),
        "num_experts_per_tok": 2,
        "null_expert": True,
        "target_blocks": list(blocks),
        "layers_to_transform": layers if isinstance(layers, int) else list(layers),
        "expert_activation": "gelu",
    }
    return MoeLoraConfig(**{**usual, **fields})


def train_mixda(
    model: MixtureModel,
    domains: Mapping[str, Any],
    task: Any,
    args: TrainingArguments,
    *,
    task_expert: str,
    general: Any = None,
    collator: Callable | None = None,
    checkpoints: bool = False,
) -> MixdaReport:
    """Train domain experts on unlabelled text, and then routers and a task expert on labelled text.

    Stage 1, domain by domain: the domain's expert and the routers train on its texts. All other
    experts are banned, shared ones too, so the routers weigh that one against the base alone. Stage
    2: the routers and `task_expert` train on `task`, all other experts are frozen. Every expert and
    the base act on every token, each with its probability; afterwards, in use, the best
    `num_experts_per_tok` do. With the best alone in training, a task expert that is not among them
    would never get a gradient.

    As in the paper: the base takes part in both stages, each domain is trained apart, domain
    experts rest in stage 2, texts from elsewhere keep them off what they do not know; and with
    `mixda_config` the experts are bottlenecks beside the FFNs of some layers. With any other
    configuration they are what and where that says, such as LoRAs in all linears. Different from
    the paper: the weights are the routers' softmax, not an attention over outputs. The same routers
    go from domain to domain. The loss is the language model's, not one of masked entities, for
    `general` too, whose rows are labelled as the base's (and the domain's as its expert's); the
    paper takes the squared distance to the base's activations. The task expert has the domain
    experts' places, and the routers choose it too.

    Args:
        model: a mixture with `null_expert`, and `num_experts_per_tok` of 2 or more; `mixda_config`
            gives both.
        domains: by expert its unlabelled texts.
        task: the labelled texts.
        args: `TrainingArguments`, used for each run.
        task_expert: the expert that learns the task.
        general: texts of no domain; without them the routers learn in stage 1 from the language
            model's loss alone.
        collator: by default `PadRouting`.
        checkpoints: write those that `args` asks for.

    Raises:
        ValueError: no `null_expert`, one expert a token, unknown experts, a task_expert that is a
            domain's, no or too short texts, or inside `use_experts`.
        TypeError: no `TrainingArguments`, or data of another type.
    """
    texts, last = _checked(model, domains, task, args, task_expert, general)
    runs = {}
    for name, rows in texts.items():
        others = set(model.moelora_config.expert_names or []) - {name}
        with only_training(model, name, routers=True), model.use_experts(ban=others):
            runs[name] = fit(model, rows, args, f"domains/{name}", collator, checkpoints)
    with ExitStack() as stack:
        stack.enter_context(only_training(model, task_expert, routers=True))
        for router in model.moelora.router_list:
            stack.callback(setattr, router, "num_experts_per_tok", router.num_experts_per_tok)
            router.num_experts_per_tok = router.num_choices
        run = fit(model, last, args, f"task/{task_expert}", collator, checkpoints)
    return MixdaReport(runs, run)


def _checked(
    model: MixtureModel, domains: Any, task: Any, args: Any, task_expert: str, general: Any
) -> tuple[dict[str, Texts], Texts]:
    """The texts of each domain, among them the general ones, and the task's."""
    check_arguments(model, domains, args, null_expert=False)
    check_arguments(model, {task_expert: task}, args, null_expert=False)
    config = model.moelora_config
    check_names([*domains, task_expert], config.routed_expert_names, "experts that routers choose")
    if task_expert in domains:
        raise ValueError(f"task_expert={task_expert!r} is a domain's expert: name another one.")
    if not config.null_expert:
        raise ValueError(
            "MixDA needs the base as a choice: make the mixture with null_expert=True."
        )
    if config.num_experts_per_tok < 2:
        # Nothing learns where it is the base.
        chosen = f"num_experts_per_tok={config.num_experts_per_tok} chooses an expert or the base"
        raise ValueError(f"{chosen}: use num_experts_per_tok=2 or more.")
    texts = {name: _texts(config, name, own) for name, own in domains.items()}
    if general is not None:
        names = config.routed_expert_names
        # The number of the null expert follows the experts'.
        of_base = _texts(config, "general", general).labelled(len(names))
        for name, own in texts.items():
            texts[name] = Texts.joined([own.labelled(names.index(name)), of_base])
    return texts, _texts(config, task_expert, task)


def _texts(config: MoeLoraConfig, name: str, data: Any) -> Texts:
    """The texts of `name`, without labels for the routers."""
    texts = texts_of(name, data).unlabelled()
    if not len(texts):
        raise ValueError(f"{name} has no texts: give some, or leave it out.")
    longest = max(len(row["input_ids"]) for row in texts.rows)
    # What a sequence router reads of a text without a prompt, of which something must be left.
    prefix = config.router_prefix_tokens if config.reads_prompts else 0
    if longest <= prefix and not any("router_mask" in row for row in texts.rows):
        raise ValueError(
            f"The texts of {name!r} have no prompt and {longest} tokens at most, which the router "
            f"reads: give more than router_prefix_tokens={prefix}, or make the mixture with fewer."
        )
    return texts
