"""One pass of the stock `Trainer` over texts, on the CPU, of which nothing stays but the model."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

from torch.optim import Optimizer
from transformers import Trainer, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from benchmarks.routing.scoring import TailLogits
from moelora.training import PadRouting, Texts


def train_once(
    model: Any,
    texts: Texts,
    padding: PadRouting,
    folder: Path,
    batch: int,
    rate: float,
    warmup: int,
    optimizer: Optimizer | None = None,
    **more: Any,
) -> float:
    """Train what takes gradients, and return the seconds; the learning rate rises and then falls as
    a cosine.

    rate: the highest learning rate, after one of so many parts (`warmup`) of the steps.
    optimizer: None for Trainer's AdamW. more: of `TrainingArguments`.
    """
    steps = math.ceil(len(texts) / batch)
    arguments = TrainingArguments(
        output_dir=str(folder / "trainer"),
        max_steps=steps,
        per_device_train_batch_size=batch,
        learning_rate=rate,
        lr_scheduler_type="cosine",
        warmup_steps=math.ceil(steps / warmup),
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
        **more,
    )
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=texts,
        data_collator=TailLogits(padding, model),
        optimizers=(optimizer, None),
    )
    trainer.remove_callback(PrinterCallback)
    start = time.perf_counter()
    trainer.train()
    model.eval()
    return time.perf_counter() - start
