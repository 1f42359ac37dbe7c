"""A checkpoint's model card, and what is different of one that goes to the hub."""

from __future__ import annotations

import os
from collections.abc import Iterable
from itertools import chain
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData, try_to_load_from_cache
from huggingface_hub.utils import HFValidationError, validate_repo_id
from transformers.utils import CONFIG_NAME

from ..config import MoeLoraConfig
from ..registry import router_class

CARD = "README.md"
# By which a card is known that may be written anew.
MARK = "<!-- Written by moelora, anew at each save; without this line it is left as it is. -->"
# What transformers puts into a repository that has no card.
EMPTY_CARD = "This is the model card of a 🤗 transformers model that has been pushed on the Hub."
HEADS = {
    "AutoModelForCausalLM": "text-generation",
    "AutoModelForSequenceClassification": "text-classification",
}


def without_paths(config: MoeLoraConfig) -> None:
    """Forget in `config` where on this machine the base is."""
    name = config.base_model_name_or_path
    if name is not None and is_path(name):
        config.base_model_name_or_path = None
        config.base_subfolder = None


def is_path(name: str) -> bool:
    """Whether `name` is a folder's, there or not, and cannot be that of a repository on the hub."""
    if os.path.isabs(name) or Path(name).is_dir():
        return True
    try:
        validate_repo_id(name)
    except HFValidationError:
        return True
    return False


def on_hub(config: MoeLoraConfig) -> bool:
    """Whether the base is known to be from the hub: its commit is, or the hub's cache holds it.

    A relative folder's name, as of a base that was loaded elsewhere, may look like an id.
    """
    name = config.base_model_name_or_path
    if name is None or is_path(name):
        return False
    return config.base_revision is not None or isinstance(
        try_to_load_from_cache(name, CONFIG_NAME), str
    )


def may_write_card(folder: Path) -> bool:
    """Whether there is no card in `folder` yet, or one that nobody has made his own."""
    path = folder / CARD
    if not path.is_file():
        return True
    text = path.read_text(encoding="utf-8", errors="replace")
    return MARK in text or EMPTY_CARD in text


def model_card(config: MoeLoraConfig, auto_class: str) -> ModelCard:
    """The card of a checkpoint: its base, experts and gate, its data as far as it is known, and how
    to load it. It names no path.

    Args:
        config: as it is saved.
        auto_class: the name of the Auto class that loads it.
    """
    inside = config.base_folder is not None
    name = config.base_model_name_or_path if not inside and on_hub(config) else None
    data = ModelCardData(
        base_model=name,
        library_name="moelora",
        pipeline_tag=HEADS[auto_class],
        tags=["moelora", "lora", "mixture-of-experts"],
    )
    parts = [
        f"---\n{data.to_yaml()}\n---\n{MARK}",
        f"# A mixture of {config.num_experts} LoRA experts",
        f"**Base**: {_base(config, name)}",
        f"**Gate**: {_gate(config)}",
        "**Experts**:",
        _experts(config),
        "**Data**: what the experts and the gate were trained on is not recorded; describe it here "
        "and take the first line of this card out.",
        _loading(config, auto_class, needs_base=name is None and not inside),
    ]
    return ModelCard("\n\n".join(parts) + "\n")


def _base(config: MoeLoraConfig, name: str | None) -> str:
    kind = f"`{config.base_architecture}`"
    if config.base_folder is not None:
        return f"{kind}, in `{config.base_folder}/`"
    if name is None:
        return f"{kind} of a folder or in memory, which this card does not name"
    at = f" at `{config.base_revision}`" if config.base_revision else ""
    return f"[{name}](https://huggingface.co/{name}){at}, {kind}"


def _gate(config: MoeLoraConfig) -> str:
    scope = {
        "projection": "a router for each adapted linear",
        "site": "a router for the linears that read one tensor",
        "layer": "a router for each decoder layer",
        "model": f"one router, at decoder layer {config.router_layer}",
    }[config.router_scope]
    most = "at most " if router_class(config.router).decides_how_many else ""
    base = ", or the base alone" if config.null_expert else ""
    shared = ", ".join(config.shared_expert_names)
    return (
        f"`{config.router}`, {scope}; each {config.routing_level} takes {most}"
        f"{config.num_experts_per_tok} of the experts{base}"
        + (f", and always {shared}" if shared else "")
    )


def ranks_in_words(config: MoeLoraConfig) -> list[str]:
    """Each expert's rank, or its least and largest where linears differ: "4 to 16".

    Args:
        config: as it is saved.
    """
    return [_range(rank for rank, _ in own) for own in _shapes(config)]


def alphas_in_words(config: MoeLoraConfig) -> list[str]:
    """Each expert's lora_alpha, or its least and largest where linears differ: "8 to 32".

    Args:
        config: as it is saved.
    """
    power = 0.5 if config.use_rslora else 1.0
    return [_range(scale * rank**power for rank, scale in own) for own in _shapes(config)]


def _shapes(config: MoeLoraConfig) -> list[set[tuple[int, float]]]:
    """Of each expert the ranks and scalings that it has in linears, where it is there at all."""
    linears = list(chain.from_iterable(config.sites or []))
    by_linear = {(config.ranks_of(own), config.scaling_of(own)) for own in linears}
    by_linear = by_linear or {(config.ranks, config.scaling)}
    shapes: list[set[tuple[int, float]]] = [set() for _ in range(config.num_experts)]
    for ranks, scaling in by_linear:
        for own, rank, scale in zip(shapes, ranks, scaling, strict=True):
            # Where an expert is not, its rank is 0.
            own |= {(rank, scale)} if rank else set()
    return [own or {(0, 0.0)} for own in shapes]


def _range(numbers: Iterable[float]) -> str:
    """The least and the largest of some numbers: "4 to 16", or one: "8"."""
    ordered = sorted(numbers)
    return " to ".join(dict.fromkeys(f"{number:g}" for number in (ordered[0], ordered[-1])))


def _experts(config: MoeLoraConfig) -> str:
    rows = ["| expert | rank | from |", "|---|---|---|"]
    sources = config.expert_sources or {}
    for name, rank in zip(config.expert_names or [], ranks_in_words(config), strict=True):
        source = str(sources.get(name, "trained in this mixture")).replace("|", " ")
        rows.append(f"| {name} | {rank} | {' '.join(source.split())} |")
    return "\n".join(rows)


def _loading(config: MoeLoraConfig, auto_class: str, needs_base: bool) -> str:
    base = ', base="where the base is"' if needs_base else ""
    return "\n".join(
        [
            "```python",
            "import moelora  # pip install moelora",
            f"from transformers import {auto_class}",
            "",
            f'model = {auto_class}.from_pretrained("where this checkpoint is"{base})',
            "```",
            "",
            "In programs that do not import moelora, `trust_remote_code=True` does (it runs the "
            "import that is in this folder).",
        ]
    )
