"""Adapters trained with stock PEFT and the stock `Trainer`: one a task, and single ones on all
tasks together.
"""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel, Trainer, TrainingArguments, set_seed
from transformers.trainer_callback import PrinterCallback

from benchmarks.routing import bases
from benchmarks.routing.scoring import TailLogits, score
from benchmarks.routing.settings import Settings
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
    steps = math.ceil(len(texts) / batch)
    arguments = TrainingArguments(
        output_dir=str(folder / "trainer"),
        max_steps=steps,
        per_device_train_batch_size=batch,
        learning_rate=learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=math.ceil(steps / 12),
        seed=seed,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
    )
    collate = TailLogits(PadRouting(pad_token_id=pad), model)
    trainer = Trainer(model=model, args=arguments, train_dataset=texts, data_collator=collate)
    trainer.remove_callback(PrinterCallback)
    start = time.perf_counter()
    trainer.train()
    model.eval()
    return time.perf_counter() - start


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
