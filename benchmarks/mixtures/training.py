"""One way to train, the same for every model: the stock `Trainer`, in the order of the rows."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from benchmarks.routing.scoring import TailLogits
from moelora.training import PadRouting, Texts


def fit(
    model: Any,
    texts: Texts,
    pad: int,
    batch: int,
    rate: float,
    folder: Path,
    router_rate: float = 1.0,
) -> float:
    """Train what takes gradients, one pass over `texts` as they lie; returns the seconds.

    AdamW without weight decay, a linear warm-up over a tenth of the steps, then a cosine.

    rate: the highest learning rate. router_rate: that of the routers, as a multiple of it.
    """
    steps = math.ceil(len(texts) / batch)
    arguments = TrainingArguments(
        output_dir=str(folder / "trainer"),
        max_steps=steps,
        per_device_train_batch_size=batch,
        learning_rate=rate,
        lr_scheduler_type="cosine",
        warmup_steps=math.ceil(steps / 10),
        train_sampling_strategy="sequential",
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
    )
    if not hasattr(model, "moelora_config") or model.moelora_config.routing_level == "token":
        texts = texts.without("router_mask")
    if not hasattr(model, "moelora_config"):
        texts = texts.unlabelled()
    optimizer = torch.optim.AdamW(_groups(model, rate, router_rate), lr=rate, weight_decay=0.0)
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=texts,
        # Answers end at one place where prompts are padded on the left: few logits.
        data_collator=TailLogits(PadRouting(pad_token_id=pad, padding_side="left"), model),
        optimizers=(optimizer, None),
    )
    trainer.remove_callback(PrinterCallback)
    start = time.perf_counter()
    trainer.train()
    model.eval()
    return time.perf_counter() - start


def contiguous_head(model: Any) -> None:
    """Have the head read contiguous rows: of a slice torch would copy all its weights each time."""
    head: nn.Module = model.get_output_embeddings()
    head.register_forward_pre_hook(lambda _, inputs: (inputs[0].contiguous(), *inputs[1:]))


def count_trainable(model: Any) -> int:
    """How many parameters training changes, the routers' among them."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def _groups(model: Any, rate: float, router_rate: float) -> list[dict[str, Any]]:
    trained = [p for p in model.parameters() if p.requires_grad]
    if not hasattr(model, "moelora"):
        return [{"params": trained}]
    routers = {id(p) for p in model.moelora.routers.parameters()}
    return [
        {"params": [p for p in trained if id(p) not in routers]},
        {"params": [p for p in trained if id(p) in routers], "lr": rate * router_rate},
    ]
