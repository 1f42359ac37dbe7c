"""Tiny runs of TRL's trainers: words as tokens, data sets, and one step of each trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bases import VOCAB
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from training.runs import Recorder, batch, rows_of
from transformers import PreTrainedTokenizerFast

SETTINGS = {
    "use_cpu": True,
    "bf16": False,
    "report_to": [],
    "disable_tqdm": True,
    "save_strategy": "no",
    "logging_steps": 1,
    "max_steps": 1,
    "max_grad_norm": 0.0,
    "per_device_train_batch_size": 4,
    "learning_rate": 1e-2,
    "lr_scheduler_type": "constant",
    "seed": 7,
}


def words_tokenizer() -> PreTrainedTokenizerFast:
    """One word a token, w00 …, none of which begins another."""
    words = Tokenizer(models.WordLevel({f"w{i:02}": i for i in range(VOCAB)}, unk_token="w00"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="w00", eos_token="w02", bos_token="w01"
    )


def text(*ids: int) -> str:
    """The words of token ids."""
    return " ".join(f"w{i:02}" for i in ids)


def unpadded(inputs: dict[str, Tensor]) -> list[dict[str, list[int]]]:
    """A right-padded batch as rows without padding: what a data set of TRL holds."""
    rows = []
    for row in rows_of(inputs):
        length = int(row["attention_mask"].sum())
        rows.append({name: row[name][:length].tolist() for name in ("input_ids", "labels")})
    return rows


def tokenized(rows: int = 8) -> tuple[dict[str, Tensor], Dataset]:
    """The same rows for the stock Trainer and for TRL."""
    inputs = batch(rows)
    return inputs, Dataset.from_list(unpadded(inputs))


def preferences(rows: int = 4, shift: int = 0) -> Dataset:
    """Prompts with an answer that is chosen and one that is rejected."""
    return Dataset.from_list(
        [
            {
                "prompt": text(5 + i + shift, 6, 7 + i) + " ",
                "chosen": text(20 + i, 21, 22 + i),
                "rejected": text(40 + i, 41),
            }
            for i in range(rows)
        ]
    )


def run(trainer: type, config: type, model: Any, data: Dataset, folder: Path, **settings: Any):
    """Train with one of TRL's trainers; returns it and what was recorded."""
    given = {
        n: settings.pop(n) for n in ("ref_model", "reward_funcs", "data_collator") if n in settings
    }
    recorder = Recorder()
    callbacks = [recorder, *settings.pop("callbacks", ())]
    args = config(str(folder), **{**SETTINGS, **settings})
    made = trainer(
        model=model,
        args=args,
        train_dataset=data,
        processing_class=words_tokenizer(),
        callbacks=callbacks,
        **given,
    )
    made.train()
    return made, recorder
