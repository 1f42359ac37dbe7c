"""Gates over prompts: kinds of them, trained on labels, and how often each names a prompt's own
task.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from benchmarks.routing import bases
from benchmarks.routing.settings import Settings
from benchmarks.routing.tasks import Task, drawn
from moelora import MoeLoraConfig, MoeLoraForCausalLM
from moelora.training import PadRouting, Texts, train_gate
from moelora.training.router_init import initialise

MAIN = "linear, mean of the embeddings"
# What differs from the main gate.
GATES: dict[str, dict[str, Any]] = {
    MAIN: {},
    "linear, last token": {"router_pooling": "last"},
    "linear, attention": {"router_pooling": "attention"},
    "mlp, mean": {"router": "mlp"},
}


def gate_config(names: list[str], **changes: Any) -> MoeLoraConfig:
    """One choice a sequence, from the embeddings; experts of rank 1 in one layer, for what needs no
    experts.
    """
    fields: dict[str, Any] = {
        "num_experts": len(names),
        "expert_names": names,
        "num_experts_per_tok": 1,
        "routing_level": "sequence",
        "router_scope": "model",
        "router_input_norm": True,
        "router_aux_loss_coef": 0.0,
        "router_z_loss_coef": 0.0,
        "target_modules": "all-linear",
        "r": 1,
    }
    made = MoeLoraConfig(**{**fields, **changes})
    made.layers_to_transform = [made.router_layer]
    return made


@contextmanager
def gated(base: PreTrainedModel, names: list[str], seed: int, **changes: Any) -> Iterator[Any]:
    """`base` with a fresh gate among `names` inside, in place."""
    torch.manual_seed(seed)
    model = MoeLoraForCausalLM.from_base(base, gate_config(names, **changes)).eval()
    try:
        yield model
    finally:
        model.unload()


@torch.no_grad()
def choices(model: Any, texts: Texts, batch_size: int = 50) -> list[str]:
    """For each text the most probable choice for its prompt."""
    prompts = texts.prompts()
    found = {}
    pad = PadRouting()
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    for start in range(0, len(order), batch_size):
        numbers = order[start : start + batch_size]
        top = model.route(**pad([{"input_ids": prompts[i]} for i in numbers])).top_experts()
        found |= dict(zip(numbers, top, strict=True))
    return [found[i] for i in range(len(prompts))]


def confusion(model: Any, tests: Mapping[str, Texts]) -> dict[str, dict[str, int]]:
    """For each source how many of its prompts went to each choice."""
    names = model.moelora_config.choice_names
    found = {source: choices(model, texts) for source, texts in tests.items()}
    return {source: {name: own.count(name) for name in names} for source, own in found.items()}


def accuracy(counts: Mapping[str, Mapping[str, int]]) -> float:
    """The share of all prompts that went to their own task's expert."""
    right = sum(own.get(source, 0) for source, own in counts.items())
    return right / sum(sum(own.values()) for own in counts.values())


def run_gates(settings: Settings, seed: int) -> dict[str, Any]:
    """Routing accuracy of every kind of gate on all test prompts, and the main one's confusion
    matrices.
    """
    tokenizer = bases.load_tokenizer(settings.base)
    base = bases.load(settings.base)
    texts = settings.gate_texts(settings.all_tasks, seed, tokenizer)
    tests = {task.name: Texts.of(task.test, tokenizer) for task in settings.all_tasks}
    names = settings.names
    own = {n: texts[n] for n in names}
    own_tests = {n: tests[n] for n in names}
    found: dict[str, Any] = {"accuracy": {}, "seconds": {}}

    def measured(
        kind: str, model: Any, learned: Mapping[str, Texts] | None, asked: Mapping[str, Texts]
    ) -> dict:
        start = time.perf_counter()
        if learned:
            train_gate(model, learned, seed=seed)
        found["seconds"][kind] = time.perf_counter() - start
        counts = confusion(model, asked)
        found["accuracy"][kind] = accuracy(counts)
        return counts

    for kind, changes in GATES.items():
        with gated(base, names, seed, **changes) as model:
            counts = measured(kind, model, own, own_tests)
            if kind == MAIN:
                found["confusion"] = counts
                asked = {
                    t.name: _sample(settings, t, seed, "selector", tokenizer)
                    for t in settings.tasks
                }
                found["on the selector's prompts"] = accuracy(confusion(model, asked))
    few = settings.sizes.prototype_texts
    with gated(base, names, seed) as model:
        initialise(model, "prototype", {n: own[n].prompts()[:few] for n in names})
        measured(f"prototypes of {few} texts, untrained", model, None, own_tests)
    layer = min(settings.sizes.router_layer, base.config.num_hidden_layers - 1)
    sample = {
        task.name: _sample(settings, task, seed, "deep", tokenizer) for task in settings.tasks
    }
    with gated(base, names, seed, router_layer=layer) as model:
        measured(f"linear, mean before layer {layer}", model, own, sample)
    found["accuracy"] |= left_out(base, own, own_tests, seed)
    if settings.harder:
        with gated(base, list(texts), seed) as model:
            found["confusion_harder"] = measured("harder", model, texts, tests)
            found["accuracy_harder"] = found["accuracy"].pop("harder")
    return found


def run_bare(settings: Settings, seed: int) -> dict[str, Any]:
    """Routing accuracy of the gates where prompts, to learn from and to be asked, lack their
    template's words.
    """
    tokenizer = bases.load_tokenizer(settings.base)
    base = bases.load(settings.base)
    tasks = [task.without_template() for task in settings.tasks]
    texts = settings.gate_texts(tasks, seed, tokenizer)
    tests = {task.name: Texts.of(task.test, tokenizer) for task in tasks}
    found = {}
    for kind, changes in GATES.items():
        with gated(base, settings.names, seed, **changes) as model:
            train_gate(model, texts, seed=seed)
            found[f"{kind}; prompts without their template's words"] = accuracy(
                confusion(model, tests)
            )
    return {"accuracy": found}


def _sample(
    settings: Settings, task: Task, seed: int, part: str, tokenizer: PreTrainedTokenizerBase
) -> Texts:
    sizes = settings.sizes
    count = sizes.deep_texts if part == "deep" else sizes.selector_samples
    return Texts.of(drawn(task.test, count, seed, f"{task.name}, {part}"), tokenizer)


def left_out(
    base: PreTrainedModel, texts: Mapping[str, Texts], tests: Mapping[str, Texts], seed: int
) -> dict[str, float]:
    """The descriptor router with each task in turn left out of its training and described
    afterwards.

    Its accuracy on all tasks, and on the prompts of the tasks that were left out; means over the
    tasks in turn.
    """
    on_all = []
    on_new = []
    for new in texts:
        others = {name: own for name, own in texts.items() if name != new}
        with gated(base, list(others), seed, router="descriptor") as model:
            model.describe_experts({name: own.prompts() for name, own in others.items()})
            train_gate(model, others, seed=seed)
            model.add_expert(new)
            model.describe_experts({new: texts[new].prompts()})
            counts = confusion(model, tests)
        on_all.append(accuracy(counts))
        on_new.append(accuracy({new: counts[new]}))
    return {
        "descriptors, one task described only: all tasks": sum(on_all) / len(on_all),
        "descriptors, one task described only: that task": sum(on_new) / len(on_new),
    }
