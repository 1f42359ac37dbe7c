"""Saving: safetensors only, atomic, with a reference to the base or the base itself.

`model.safetensors` holds the trained tensors and, in its header, the configuration and the base's
fingerprint: replacing that one file is what makes a save happen. `config.json` repeats the
configuration for people and for the Auto classes. The base, with `save_base`, lies in a folder
named by its fingerprint.
"""

from __future__ import annotations

import copy
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import CONFIG_NAME, GENERATION_CONFIG_NAME, SAFE_WEIGHTS_NAME

from ..config import MoeLoraConfig
from ..core.model import base_class
from ..injection.targets import saved_modules
from .fingerprint import digest, fingerprint

PREFIX = "moelora."
BASE_FOLDER = re.compile(r"base-[0-9a-f]{16}")
STAGING_PREFIX = ".moelora-"

# Of PreTrainedModel.save_pretrained's keywords: those for the base, and those that change nothing
# here.
BASE_KEYWORDS = frozenset({"max_shard_size", "save_original_format"})
IDLE_KEYWORDS = frozenset({"safe_serialization", "save_function", "save_peft_format", "token"})


def trained_keys(model: Any) -> list[str]:
    """The state dict's keys that a checkpoint holds: the mixture's, and the base's trained
    modules'.
    """
    trained = {
        n for n, p in model.named_parameters() if p.requires_grad and not n.startswith(PREFIX)
    }
    for name, module in saved_modules(model, model.moelora_config, model.is_classifier):
        # Also where the user froze it after training it.
        trained |= {f"{name}.{n}" for n, _ in module.named_parameters()}
    return [k for k in torch.nn.Module.state_dict(model) if k.startswith(PREFIX) or k in trained]


def save(
    model: Any,
    folder: str | Path,
    state_dict: Mapping[str, Tensor] | None,
    save_base: bool,
    **kwargs,
) -> None:
    """Write `model` into `folder`; see `MoeLoraModel.save_pretrained`."""
    folder = Path(folder)
    _check_keywords(kwargs)
    _check_not_the_base(model, folder, save_base)
    keys = trained_keys(model)
    state_dict = torch.nn.Module.state_dict(model) if state_dict is None else state_dict
    tensors = {k: state_dict[k].detach().cpu().contiguous() for k in keys}
    print_ = fingerprint(model, keys)
    config = describe(model, folder)
    if save_base:
        # Else it is None, or where this model's base lies in this folder already.
        config.base_folder = f"base-{digest(print_)}"
    text = json.dumps(config.own_fields(), indent=2) + "\n"
    metadata = {"format": "pt", "moelora_config": text, "base": json.dumps(print_)}
    with _errors_naming(folder), _staging(folder) as staging:
        # All is written before anything is replaced: a full disk shows here.
        (staging / CONFIG_NAME).write_text(text, encoding="utf-8")
        if model.can_generate():
            model.generation_config.save_pretrained(staging)
        safetensors.torch.save_file(tensors, staging / SAFE_WEIGHTS_NAME, metadata=metadata)
        if config.base_folder and not (folder / config.base_folder).is_dir():
            with as_base(model) as base:
                base.save_pretrained(
                    staging / "base", **{k: v for k, v in kwargs.items() if k in BASE_KEYWORDS}
                )
            os.replace(staging / "base", folder / config.base_folder)
        # From the first of these on the new checkpoint is the one that loads; what follows is for
        # people.
        for name in (SAFE_WEIGHTS_NAME, GENERATION_CONFIG_NAME, CONFIG_NAME):
            if (staging / name).is_file():
                _put(staging / name, folder / name)
        for stale in folder.iterdir():
            if BASE_FOLDER.fullmatch(stale.name) and stale.name != config.base_folder:
                shutil.rmtree(stale)


def describe(model: Any, folder: Path) -> MoeLoraConfig:
    """A copy of the mixture's configuration that also says which base it belongs to."""
    config = copy.deepcopy(model.moelora_config)
    base = model.config.to_diff_dict()
    for ours in ("keys_to_ignore_at_inference", "quantization_config"):
        base.pop(ours, None)
    base["dtype"] = str(model.dtype).removeprefix("torch.")
    config.base_config = base
    config.base_architecture = model._get_name()
    config.base_model_name_or_path = model.config._name_or_path or None
    config.base_folder = None
    origin = _local_base(model)
    if origin is not None:
        # The checkpoint may be loaded from another working directory.
        config.base_model_name_or_path = str(origin)
        if origin.parent == folder.resolve() and BASE_FOLDER.fullmatch(origin.name):
            config.base_folder = origin.name
    return config


@contextmanager
def as_base(model: Any) -> Iterator[PreTrainedModel]:
    """`model` with its base's class and without the mixture's tensors, while inside; hooks stay."""
    cls, mixture = type(model), model._modules.pop("moelora")
    ignored = model.config.__dict__.pop("keys_to_ignore_at_inference", None)
    attached = model.__dict__.pop("_hf_peft_config_loaded", None)
    model.__class__ = base_class(cls)
    try:
        yield model
    finally:
        model.__class__ = cls
        model._modules["moelora"] = mixture
        if ignored is not None:
            model.config.keys_to_ignore_at_inference = ignored
        if attached is not None:
            model._hf_peft_config_loaded = attached


def _local_base(model: Any) -> Path | None:
    """The folder that the base was loaded from, or None."""
    name = model.config._name_or_path
    return Path(name).resolve() if name and Path(name).is_dir() else None


def _check_keywords(kwargs: Mapping[str, Any]) -> None:
    if kwargs.pop("push_to_hub", False):  # type: ignore[attr-defined]
        raise ValueError(
            "save_pretrained(push_to_hub=True) is not supported: call model.push_to_hub(repo_id), or save "
            "(with save_base=True where the base is no public model) and upload the folder with `hf upload`."
        )
    unknown = sorted(set(kwargs) - BASE_KEYWORDS - IDLE_KEYWORDS)
    if unknown:
        raise TypeError(
            f"save_pretrained has no keyword {unknown}. It takes is_main_process, state_dict, save_base, and "
            f"for the base {', '.join(sorted(BASE_KEYWORDS))}."
        )


def _check_not_the_base(model: Any, folder: Path, save_base: bool) -> None:
    if not save_base and _local_base(model) == folder.resolve():
        raise ValueError(
            f"{folder} holds the base itself: saving there would overwrite the weights that the checkpoint "
            "refers to. Save into another folder, or with save_base=True."
        )


@contextmanager
def _errors_naming(folder: Path) -> Iterator[None]:
    """Make what goes wrong while writing an OSError that names the folder."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        number = getattr(error, "errno", None)
        raise OSError(
            number, f"The checkpoint in {folder} could not be written: {error}"
        ) from error


@contextmanager
def _staging(folder: Path) -> Iterator[Path]:
    """A hidden folder inside `folder` to write into, gone at the end; what a killed save left goes
    first.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for leftover in folder.glob(STAGING_PREFIX + "*"):
        shutil.rmtree(leftover)
    staging = Path(tempfile.mkdtemp(prefix=STAGING_PREFIX, dir=folder))
    try:
        yield staging
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _put(source: Path, target: Path) -> None:
    """Move a wholly written file to its place, readable by whom a new file is."""
    os.chmod(source, (source.parent / CONFIG_NAME).stat().st_mode)
    with open(source, "rb+") as file:
        os.fsync(file.fileno())
    os.replace(source, target)
