"""Part a: all tasks at once, single LoRAs against mixtures."""

from __future__ import annotations

from benchmarks.mixtures.models import LORAS, MIXTURES, VARIANTS, Candidate, equal_lora
from benchmarks.mixtures.setup import Setup, Trial, compared

# The mixture whose trainable parameters the largest single LoRA has.
EQUAL_TO = "8 x r=4, top 2"


def lanes(setup: Setup) -> list[str]:
    """The models' names, each of which can be run alone."""
    return [made.name for made in setup.wanted(candidates(setup))]


def candidates(setup: Setup) -> list[Candidate]:
    """Single LoRAs and mixtures, and where models are asked for by name, variants too."""
    loras = [*LORAS.values(), equal_lora(setup.base, MIXTURES[EQUAL_TO])]
    variants = VARIANTS.values() if setup.only_models else ()
    return [*loras, *MIXTURES.values(), *variants]


def run(setup: Setup, name: str) -> None:
    """Everything about one model."""
    models = {made.name: made for made in candidates(setup)}
    compared(setup, trial(setup), models[name])


def trial(setup: Setup) -> Trial:
    """The rows and steps of this part."""
    return Trial("joint", setup.splits, setup.sizes.steps, setup.sizes.batch)
