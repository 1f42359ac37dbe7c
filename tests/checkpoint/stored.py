"""Mixtures on bases that lie in folders, written out, read back, and damaged."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from bases import causal_base, classifier_base
from core.mixtures import FIELDS, activate, tokens
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel

from moelora import MoeLoraConfig, MoeLoraForCausalLM, MoeLoraForSequenceClassification
from moelora.checkpoint.reading import sealed

WEIGHTS = "model.safetensors"


def write_base(folder: Path, name: str = "llama", classifier: bool = False, **kwargs: Any) -> Path:
    """A tiny base saved into `folder`, as a user would have it."""
    base = classifier_base(name, **kwargs) if classifier else causal_base(name, **kwargs)
    base.save_pretrained(folder)
    return folder


def mixture_on(base: Path | PreTrainedModel, classifier: bool = False, **fields: Any) -> Any:
    """A mixture whose experts do something, on the base in a folder or a loaded one."""
    public = MoeLoraForSequenceClassification if classifier else MoeLoraForCausalLM
    torch.manual_seed(1)
    return activate(public.from_base(base, MoeLoraConfig(**{**FIELDS, **fields}))).eval()


def saved(folder: Path, **fields: Any) -> Any:
    """A mixture on a llama in `folder / "its-base"`, saved into `folder / "experts"`."""
    model = mixture_on(write_base(folder / "its-base"), **fields)
    model.save_pretrained(folder / "experts")
    return model


def load(folder: Path, classifier: bool = False, **kwargs: Any) -> Any:
    """The model in `folder`, through the Auto class."""
    auto = AutoModelForSequenceClassification if classifier else AutoModelForCausalLM
    return auto.from_pretrained(folder, **kwargs)


@torch.no_grad()
def logits(model: Any) -> Tensor:
    """What `model` says to fixed tokens."""
    return model(tokens()).logits


def same(one: Any, other: Any) -> bool:
    """Whether two models give the same logits, bit for bit."""
    return torch.equal(logits(one), logits(other))


def rewrite(
    folder: Path,
    tensors: Callable[[dict[str, Tensor]], Any] | None = None,
    config: dict[str, Any] | None = None,
) -> None:
    """Change what the checkpoint in `folder` holds: its tensors in place, fields of its header's
    config.
    """
    path = folder / WEIGHTS
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    held = safetensors.torch.load_file(path)
    if tensors is not None:
        tensors(held)
    fields = json.dumps(json.loads(metadata["moelora_config"]) | (config or {}))
    safetensors.torch.save_file(held, path, metadata=sealed(fields, metadata["base"]))


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below `folder` with its bytes."""
    return {
        str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()
    }
