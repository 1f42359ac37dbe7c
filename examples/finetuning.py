"""One way to train, the same for every candidate of an example: the stock `Trainer`."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from corpus import Blocks, interleave
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments, set_seed
from transformers.trainer_callback import PrinterCallback

from moelora.training import PadRouting, Texts

Corpus = dict[str, tuple[Blocks, Blocks]]
SCALE = 2.0  # lora_alpha / r, the same for every candidate
ROWS = 4  # of texts in one step


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


def _arguments(recipe: Recipe, rows: int, steps: int) -> TrainingArguments:
    """Return AdamW's settings: short warm-up, cosine decay, the rows in the order they lie."""
    return TrainingArguments(
        output_dir=str(recipe.output / "trainer"),
        max_steps=steps,
        per_device_train_batch_size=rows,
        per_device_eval_batch_size=8,
        learning_rate=recipe.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=math.ceil(steps / 12),
        train_sampling_strategy="sequential",
        seed=recipe.seed,
        logging_steps=max(1, steps // 6),
        save_strategy="no",
        report_to="none",
        prediction_loss_only=True,
        dataloader_pin_memory=False,
    )


class _Progress(TrainerCallback):
    """Tells of every step's rows."""

    def __init__(self, rows: int, done: Callable[[int], None]):
        self.rows = rows
        self.done = done

    def on_step_end(self, args, state, control, **kwargs):
        self.done(self.rows)


def fit(
    model: PreTrainedModel | PeftModel,
    texts: Texts,
    collator: PadRouting,
    recipe: Recipe,
    done: Callable[[int], None],
) -> None:
    """Fine-tune in place, one pass over the texts; `done` is told of so many rows at a time."""
    arguments = _arguments(recipe, ROWS, math.ceil(len(texts) / ROWS))
    arguments.disable_tqdm = True
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=texts,
        data_collator=collator,
        callbacks=[_Progress(ROWS, done)],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()


def _trainer(model: PreTrainedModel | PeftModel, recipe: Recipe, **data: Blocks) -> Trainer:
    """Return the stock Trainer on blocks, one of each domain a step."""
    # The blocks come interleaved: in order, every batch holds each domain once.
    rows = len(set(data["train_dataset"].domains)) if "train_dataset" in data else 1
    return Trainer(model=model, args=_arguments(recipe, rows, recipe.steps), **data)


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
