"""One way to train and measure, the same for every candidate of the demo: the stock `Trainer`."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from pathlib import Path

from corpus import Blocks, interleave
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel, Trainer, TrainingArguments, set_seed

Corpus = dict[str, tuple[Blocks, Blocks]]
SCALE = 2.0  # lora_alpha / r, the same for every candidate


@dataclass(frozen=True)
class Recipe:
    """What all candidates share: steps, peak learning rate, seed."""

    steps: int
    learning_rate: float
    seed: int
    output: Path


@dataclass(frozen=True)
class Result:
    """One candidate's line in the table."""

    name: str
    trainable: int
    active: int
    seconds: float
    loss: dict[str, float]

    @property
    def mean(self) -> float:
        """Return the mean over domains of the held-out loss, in nats a token."""
        return sum(self.loss.values()) / len(self.loss)


def count_trainable(model: PreTrainedModel | PeftModel) -> int:
    """Return how many parameters training changes."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def single_lora(base: PreTrainedModel, rank: int, seed: int) -> PeftModel:
    """Return PEFT's LoRA of that rank on all linears of `base`."""
    set_seed(seed)
    config = LoraConfig(r=rank, lora_alpha=SCALE * rank, target_modules="all-linear")
    return get_peft_model(base, config)


def _trainer(model: PreTrainedModel | PeftModel, recipe: Recipe, **data: Blocks) -> Trainer:
    """Return the stock Trainer: AdamW, short warm-up, cosine decay, one block a domain a step."""
    rows = len(set(data["train_dataset"].domains)) if "train_dataset" in data else 1
    arguments = TrainingArguments(
        output_dir=str(recipe.output / "trainer"),
        max_steps=recipe.steps,
        per_device_train_batch_size=rows,
        per_device_eval_batch_size=8,
        learning_rate=recipe.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=math.ceil(recipe.steps / 12),
        # The blocks come interleaved: in order, every batch holds each domain once.
        train_sampling_strategy="sequential",
        seed=recipe.seed,
        logging_steps=max(1, recipe.steps // 6),
        save_strategy="no",
        report_to="none",
        prediction_loss_only=True,
        dataloader_pin_memory=False,
    )
    return Trainer(model=model, args=arguments, **data)


def train(model: PreTrainedModel | PeftModel, corpus: Corpus, recipe: Recipe) -> float:
    """Fine-tune in place, one block of each domain a step; return the seconds it took."""
    mixed = interleave([train_blocks for train_blocks, _ in corpus.values()])
    trainer = _trainer(model, recipe, train_dataset=mixed)
    start = time.perf_counter()
    trainer.train()
    return time.perf_counter() - start


def held_out_loss(
    model: PreTrainedModel | PeftModel, corpus: Corpus, recipe: Recipe
) -> dict[str, float]:
    """Return the mean loss on each domain's held-out blocks, in nats a token."""
    trainer = _trainer(model, recipe)
    return {
        domain: trainer.evaluate(held_out)["eval_loss"] for domain, (_, held_out) in corpus.items()
    }
