"""The paper's way (Adapters Selector, COLING 2025): a LoRA that writes the task's name after the
prompt, as text.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from benchmarks.routing import bases
from benchmarks.routing.experts import lora, train
from benchmarks.routing.settings import Settings
from benchmarks.routing.tasks import drawn
from moelora.training import Texts

MAX_LABEL_TOKENS = 8
SELECTOR = "selector"


def run_selector(settings: Settings, seed: int) -> dict[str, Any]:
    """Train a selector on the texts that the gates learn from; the share of names that it writes
    right.
    """
    tokenizer = bases.load_tokenizer(settings.base)
    sizes = settings.sizes
    rows = [
        {"instruction": row["instruction"], "output": task.name}
        for task in settings.tasks
        for row in settings.learned(task, seed)
    ]
    model = lora(bases.load(settings.base), sizes.rank, seed)
    folder = settings.adapter(seed, SELECTOR)
    texts = Texts.of(rows, tokenizer)
    seconds = train(model, texts, bases.pad_id(tokenizer), sizes.selector_batch, seed, folder)
    model.save_pretrained(str(folder))
    counts: dict[str, dict[str, int]] = {}
    for task in settings.tasks:
        asked = drawn(task.test, sizes.selector_samples, seed, f"{task.name}, selector")
        prompts = Texts.of(asked, tokenizer).prompts()
        found = written(model, prompts, tokenizer)
        known = [name if name in settings.names else "(unknown)" for name in found]
        counts[task.name] = {name: known.count(name) for name in [*settings.names, "(unknown)"]}
    return {"confusion": counts, "seconds": seconds}


def written(
    model: Any, prompts: list[Tensor], tokenizer: PreTrainedTokenizerBase, batch_size: int = 16
) -> list[str]:
    """The label that the model writes greedily after each prompt, up to the end of the text or
    line.
    """
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    found = {}
    for start in range(0, len(order), batch_size):
        numbers = order[start : start + batch_size]
        batch = left_padded([prompts[i] for i in numbers], bases.pad_id(tokenizer))
        made = generate(model, batch, tokenizer)[:, batch["input_ids"].shape[1] :]
        names = [_name(text) for text in tokenizer.batch_decode(made, skip_special_tokens=True)]
        found |= dict(zip(numbers, names, strict=True))
    return [found[i] for i in range(len(prompts))]


def generate(model: Any, batch: dict[str, Tensor], tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """Greedy generation of a label."""
    return model.generate(
        **batch,
        max_new_tokens=MAX_LABEL_TOKENS,
        do_sample=False,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def left_padded(prompts: list[Tensor], pad: int) -> dict[str, Tensor]:
    """Prompts as one batch, padded on the left."""
    length = max(len(prompt) for prompt in prompts)
    gaps = [length - len(prompt) for prompt in prompts]
    return {
        "input_ids": torch.stack(
            [torch.cat([p.new_full((g,), pad), p]) for p, g in zip(prompts, gaps)]
        ),
        "attention_mask": torch.tensor([[0] * g + [1] * (length - g) for g in gaps]),
    }


def _name(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[0].strip() if lines else ""
