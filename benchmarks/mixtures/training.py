"""One way to train, the same for every model: the stock `Trainer`, in the order of the rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.routing.trainer import train_once
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
    optimizer = torch.optim.AdamW(_groups(model, rate, router_rate), lr=rate, weight_decay=0.0)
    # Answers end at one place where prompts are padded on the left: few logits.
    padding = PadRouting(pad_token_id=pad, padding_side="left")
    order = {"train_sampling_strategy": "sequential"}
    return train_once(model, texts, padding, folder, batch, rate, 10, optimizer, **order)


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
