"""The adapters as one mixture: routed by sequence and by token, forced one by one, and merged
evenly.
"""

from __future__ import annotations

import time
from typing import Any

from transformers import PreTrainedTokenizerBase, set_seed

from benchmarks.routing import bases
from benchmarks.routing.experts import train
from benchmarks.routing.scoring import Score, Sheet, score
from benchmarks.routing.settings import Settings
from benchmarks.routing.tasks import Task
from moelora import MoeLoraConfig, MoeLoraForCausalLM
from moelora.training import Texts, train_gate
from moelora.training.router_init import initialise

# Two experts a prompt, weights summing to 1: where tasks are alike, the gate is unsure which of
# them it is.
TOP_2 = "gated, sequence, top 2"
SEQUENCE = "gated, sequence"
TOKEN = "gated, token"
UNIFORM = "uniform merge"
BASE = "base"
ROUTER_LEARNING_RATE = 1e-2
Scores = dict[str, Score]


def compose(settings: Settings, tasks: tuple[Task, ...], seed: int, **fields: Any) -> Any:
    """The adapters of these tasks in one model, one expert at a time."""
    set_seed(seed)
    config = MoeLoraConfig(
        num_experts=len(tasks),
        expert_names=[task.name for task in tasks],
        router_aux_loss_coef=0.0,
        router_z_loss_coef=0.0,
        router_input_norm=True,
        **{"num_experts_per_tok": 1, **fields},
    )
    adapters = {task.name: str(settings.adapter(seed, task.name)) for task in tasks}
    return MoeLoraForCausalLM.from_adapters(settings.base, adapters, config, dtype="float32").eval()


def sequence_gated(
    settings: Settings,
    tasks: tuple[Task, ...],
    seed: int,
    tokenizer: PreTrainedTokenizerBase,
    **fields: Any,
) -> Any:
    """The mixture with one choice a prompt, from the embeddings, its gate trained on labels."""
    model = compose(settings, tasks, seed, routing_level="sequence", router_scope="model", **fields)
    train_gate(model, settings.gate_texts(tasks, seed, tokenizer), seed=seed)
    return model.eval()


def token_gated(settings: Settings, seed: int, tokenizer: PreTrainedTokenizerBase) -> Any:
    """The mixture with a router a layer that chooses for each token: prototypes, then trained on
    loss and labels.
    """
    sizes = settings.sizes
    model = compose(settings, settings.tasks, seed, routing_level="token", router_scope="layer")
    texts = settings.gate_texts(settings.tasks, seed, tokenizer)
    initialise(
        model, "prototype", {n: t.prompts()[: sizes.prototype_texts] for n, t in texts.items()}
    )
    each = sizes.token_gate_steps * sizes.batch // len(texts)
    labelled = [
        own.subset(range(min(each, len(own)))).labelled(i) for i, own in enumerate(texts.values())
    ]
    model.freeze_experts(settings.names)
    train(
        model,
        Texts.joined(labelled),
        bases.pad_id(tokenizer),
        sizes.batch,
        seed,
        settings.folder / f"seed{seed}" / "token",
        learning_rate=ROUTER_LEARNING_RATE,
    )
    return model


def run_mixtures(settings: Settings, seed: int) -> dict[str, Any]:
    """The score on every task of the base, each expert, their even merge, and the mixture at both
    levels.
    """
    tokenizer = bases.load_tokenizer(settings.base)
    tasks = settings.tasks
    sheets = {task.name: settings.sheet(task, seed, tokenizer) for task in tasks}
    seconds = _Clock()
    model = sequence_gated(settings, tasks, seed, tokenizer)
    seconds("compose and gate")
    found = {SEQUENCE: scores(model, sheets)}
    with model.use_experts({tasks[0].name: 0.0}):
        found[BASE] = scores(model, sheets)
    for task in tasks:
        with model.use_experts(task.name):
            found[task.name] = scores(model, sheets)
    with model.use_experts(dict.fromkeys(settings.names, 1 / len(tasks))):
        found[UNIFORM] = scores(model, sheets)
    seconds("scores")
    del model
    model = token_gated(settings, seed, tokenizer)
    seconds("token gate")
    found[TOKEN] = scores(model, sheets)
    seconds("token scores")
    return {"scores": found, "parts": seconds.parts}


def run_harder(settings: Settings, seed: int) -> dict[str, Any]:
    """The score on all tasks, the harder ones too, of the gate among all of them, and of each
    task's own expert.
    """
    tokenizer = bases.load_tokenizer(settings.base)
    tasks = settings.all_tasks
    sheets = {task.name: settings.sheet(task, seed, tokenizer) for task in tasks}
    model = sequence_gated(settings, tasks, seed, tokenizer)
    found = {SEQUENCE: scores(model, sheets), "oracle": {}}
    for task in tasks:
        with model.use_experts(task.name):
            found["oracle"][task.name] = score(model, sheets[task.name])
    del model
    model = sequence_gated(settings, tasks, seed, tokenizer, num_experts_per_tok=2)
    found[TOP_2] = scores(model, sheets)
    return {"scores": found}


def scores(model: Any, sheets: dict[str, Sheet]) -> Scores:
    """The model's score on every task."""
    return {name: score(model, sheet) for name, sheet in sheets.items()}


class _Clock:
    """Seconds since the last call, by what they went to."""

    def __init__(self):
        self.parts = {}
        self.last = time.perf_counter()

    def __call__(self, what: str) -> None:
        now = time.perf_counter()
        self.parts[what] = now - self.last
        self.last = now
