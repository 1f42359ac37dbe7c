"""Adapters trained with stock PEFT and the stock `Trainer`: one a task, and single ones on all
tasks together.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel, set_seed

from benchmarks.routing import bases
from benchmarks.routing.scoring import score
from benchmarks.routing.settings import Settings
from benchmarks.routing.trainer import train_once
from moelora.training import PadRouting, Texts

LEARNING_RATE = 1e-3


def lora(base: PreTrainedModel, rank: int, seed: int) -> PeftModel:
    """A fresh LoRA of that rank on all linears, lora_alpha = 2 r."""
    set_seed(seed)
    config = LoraConfig(
        r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    return get_peft_model(base, config)  # type: ignore[return-value]


def train(
    model: Any,
    texts: Texts,
    pad: int,
    batch: int,
    seed: int,
    folder: Path,
    learning_rate: float = LEARNING_RATE,
) -> float:
    """One epoch by the stock Trainer, with AdamW and a cosine after a short warm-up; returns the
    seconds.
    """
    padding = PadRouting(pad_token_id=pad)
    return train_once(model, texts, padding, folder, batch, learning_rate, warmup=12, seed=seed)


def train_experts(settings: Settings, seed: int) -> dict[str, Any]:
    """One adapter a task, the harder ones too, from its own texts alone, saved as PEFT does."""
    tokenizer = bases.load_tokenizer(settings.base)
    sizes = settings.sizes
    seconds = {}
    for task in settings.all_tasks:
        model = lora(bases.load(settings.base), sizes.rank, seed)
        texts = settings.expert_texts(task, seed, tokenizer)
        folder = settings.adapter(seed, task.name)
        seconds[task.name] = train(model, texts, bases.pad_id(tokenizer), sizes.batch, seed, folder)
        model.save_pretrained(str(folder))
    return {"seconds": seconds}


def train_joint(settings: Settings, seed: int, rank: int) -> dict[str, Any]:
    """One LoRA on the texts of all tasks, mixed, for the experts' steps together; its score on each
    task.
    """
    tokenizer = bases.load_tokenizer(settings.base)
    sizes = settings.sizes
    model = lora(bases.load(settings.base), rank, seed)
    texts = Texts.joined([settings.expert_texts(task, seed, tokenizer) for task in settings.tasks])
    folder = settings.folder / f"seed{seed}" / f"joint{rank}"
    train(model, texts, bases.pad_id(tokenizer), sizes.batch, seed, folder)
    sheets = {task.name: settings.sheet(task, seed, tokenizer) for task in settings.tasks}
    return {"scores": {name: score(model, sheet) for name, sheet in sheets.items()}}
