"""Adapters of single tasks, trained by stock PEFT and saved as it saves them."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.mixtures.data import Split, batches
from benchmarks.mixtures.evaluation import evaluate, mean
from benchmarks.mixtures.models import Candidate, build, lora
from benchmarks.mixtures.rates import search
from benchmarks.mixtures.setup import Setup, Trial, settings_of
from benchmarks.mixtures.store import key_of
from benchmarks.mixtures.training import contiguous_head, fit
from moelora import MoeLoraConfig, MoeLoraForCausalLM

RANK = 8
MODEL = lora(RANK)


def trial(setup: Setup, split: Split) -> Trial:
    """One task's own rows and steps."""
    return Trial("adapter", (split,), setup.sizes.task_steps, setup.sizes.batch, split.name)


def adapter(setup: Setup, split: Split, made: Candidate, rate: float, seed: int) -> Path:
    """The folder of a task's adapter, which is trained unless it is there."""
    own = trial(setup, split)
    path = setup.work / "adapters" / key_of(settings_of(setup, own, made, rate, seed))
    if (path / "adapter_config.json").is_file():
        return path
    model = build(made, setup.base, seed, setup.dtype)
    texts = batches([split], setup.tokenizer, own.steps, own.batch, seed)
    # Another process may train it too; the one that is done first is kept.
    begun = path.with_name(f"{path.name}.{os.getpid()}")
    fit(model, texts, setup.pad, own.batch, rate, begun)
    model.save_pretrained(str(begun))
    try:
        begun.rename(path)
    except OSError:
        shutil.rmtree(begun)
    return path


def best_rate(setup: Setup) -> float:
    """The learning rate of all tasks' own adapters: by seed 0, on their validation rows."""
    return search(lambda rate: _validation_loss(setup, rate), setup.rates)


def _validation_loss(setup: Setup, rate: float) -> float:
    losses = []
    for split in setup.splits:
        settings = settings_of(setup, trial(setup, split), MODEL, rate, 0)

        def run(split: Split = split) -> Mapping[str, Any]:
            folder = adapter(setup, split, MODEL, rate, 0)
            model = composed(setup, {split.name: folder})
            sheets = {split.name: split.sheet("validation", setup.tokenizer)}
            with model.use_experts(split.name):
                return {"model": MODEL.name, **evaluate(model, sheets)}

        record = setup.store.once(settings | {"evaluated": "validation"}, run)
        losses.append(mean(record["loss"]))
    return sum(losses) / len(losses)


def composed(setup: Setup, folders: Mapping[str, Path], **fields: Any) -> Any:
    """The adapters in one model, routed by prompt from the embeddings unless `fields` say else."""
    defaults = {
        "routing_level": "sequence",
        "router_scope": "model",
        "router_input_norm": True,
        "router_aux_loss_coef": 0.0,
        "router_z_loss_coef": 0.0,
        "num_experts_per_tok": 1,
    }
    options = {k: fields.pop(k) for k in ("router_init", "dtype") if k in fields}
    config = MoeLoraConfig(
        num_experts=len(folders), expert_names=list(folders), **{**defaults, **fields}
    )
    options = {"dtype": setup.dtype, **options}
    paths = {name: str(path) for name, path in folders.items()}
    model = MoeLoraForCausalLM.from_adapters(setup.base, paths, config, **options).eval()
    contiguous_head(model)
    return model
