"""Gates over trained adapters: how they are made, and what weight a choice has."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from benchmarks.mixtures.data import Split
from benchmarks.mixtures.setup import Setup
from moelora.routers import DescriptorRouter
from moelora.routers.descriptor import MAX_TEMPERATURE
from moelora.training import Texts

# Logits this many times as large make the most probable choice all but certain.
CERTAINTY = 1e4
# So many prompts of a task at most: the gate reads the embeddings alone.
GATE_TEXTS = 200
PROTOTYPE_TEXTS = 8


@contextmanager
def decided(model: Any) -> Iterator[None]:
    """Inside, the most probable choice has the weight 1.

    A gate that was trained on labels alone leaves an unsure choice its probability as weight,
    which is not what the experts were trained with.
    """
    (router,) = model.moelora.routers.values()
    before = {name: own.detach().clone() for name, own in router.named_parameters()}
    with torch.no_grad():
        if isinstance(router, DescriptorRouter):
            router.log_temperature.fill_(math.log(MAX_TEMPERATURE))
        else:
            router.get_parameter("weight").mul_(CERTAINTY)
    try:
        yield
    finally:
        with torch.no_grad():
            for name, own in router.named_parameters():
                own.copy_(before[name])


def gate_texts(setup: Setup, splits: Sequence[Split], count: int = GATE_TEXTS) -> dict[str, Texts]:
    """By task the first of its training rows, for gates."""
    tokenizer = setup.tokenizer
    return {split.name: Texts.of(split.train[:count], tokenizer) for split in splits}


def prompts(texts: Mapping[str, Texts], count: int = PROTOTYPE_TEXTS) -> dict[str, list]:
    """By task its first prompts' token ids, for what is made without training."""
    return {name: own.prompts()[:count] for name, own in texts.items()}
