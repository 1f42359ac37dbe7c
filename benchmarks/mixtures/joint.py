"""Part a: all tasks at once, single LoRAs against mixtures."""

from __future__ import annotations

from benchmarks.mixtures.models import LORAS, MIXTURES, Candidate, equal_lora
from benchmarks.mixtures.setup import Setup, Trial, compared

# The mixture whose trainable parameters the largest single LoRA has.
EQUAL_TO = "8 x r=4, top 2"


def lanes(setup: Setup) -> list[str]:
    """The models' names, each of which can be run alone."""
    return [made.name for made in setup.wanted([*_loras(setup), *MIXTURES.values()])]


def run(setup: Setup, name: str) -> None:
    """Everything about one model."""
    models = {made.name: made for made in [*_loras(setup), *MIXTURES.values()]}
    compared(setup, trial(setup), models[name])


def trial(setup: Setup) -> Trial:
    """The rows and steps of this part."""
    return Trial("joint", setup.splits, setup.sizes.steps, setup.sizes.batch)


def _loras(setup: Setup) -> list[Candidate]:
    return [*LORAS.values(), equal_lora(setup.base, MIXTURES[EQUAL_TO])]
