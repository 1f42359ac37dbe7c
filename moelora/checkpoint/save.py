"""Saving: safetensors only, atomic, with a reference to the base or the base itself.

`model.safetensors` holds the trained tensors and, in its header, the configuration and the base's
fingerprint: replacing that one file is what makes a save happen. `config.json` repeats the
configuration for people and for the Auto classes. The base, with `save_base`, lies in a folder
named by its fingerprint, and is never deleted: checkpoints elsewhere may refer to it.
"""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import (
    CONFIG_NAME,
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    WEIGHTS_INDEX_NAME,
    WEIGHTS_NAME,
)

from ..config import MoeLoraConfig
from ..core.model import MixtureModel, base_class, public_class
from ..host_internals import PEFT_ATTACHED
from ..injection.base import check_no_peft, snapshot
from ..injection.inject import take_out_parts
from .atomic import atomic_files
from .card import CARD, may_write_card, model_card, without_paths
from .quantisation import HOW, is_quantised_at_load
from .reading import BASE_FOLDER, is_ours, sealed
from .state import digest, fingerprint, tensors_to_save

# Of PreTrainedModel.save_pretrained's keywords: those for the base, and those that change nothing
# here.
BASE_KEYWORDS = frozenset({"max_shard_size", "save_original_format"})
IDLE_KEYWORDS = frozenset({"safe_serialization", "save_function", "save_peft_format", "token"})
# What a process that never imported moelora runs under trust_remote_code=True.
MODULE = "modeling_moelora"


def save(
    model: MixtureModel,
    folder: str | os.PathLike[str],
    state_dict: Mapping[str, Tensor] | None = None,
    save_base: bool = False,
    for_hub: bool = False,
    **kwargs: Any,
) -> None:
    """Write `model` into `folder`; see `MoeLoraModel.save_pretrained`.

    for_hub: name no folder of this machine.
    """
    if not isinstance(folder, (str, os.PathLike)):
        raise TypeError(
            f"save_directory={folder!r} is a {type(folder).__name__}; expected the path of a folder"
        )
    folder = Path(folder)
    _check_keywords(kwargs)
    _check_no_adapter(model)
    _check_nothing_foreign(folder)
    tensors = tensors_to_save(model, state_dict)
    base_print = fingerprint(model, tensors, state_dict)
    config = _described(model, folder)
    if for_hub:
        without_paths(config)
    if save_base:
        model.moelora.check_resident("save its base")
        # Else it is None, or where this model's base lies in this folder already.
        config.base_folder = f"base-{digest(base_print)}"
    text = json.dumps(config.own_fields(), indent=2) + "\n"
    with atomic_files(folder, commit=SAFE_WEIGHTS_NAME) as staging:
        _write_for_auto_classes(model, config, staging)
        if may_write_card(folder):
            model_card(config, model.auto_class.__name__).save(staging / CARD)
        if model.can_generate():
            model.generation_config.save_pretrained(staging)
        metadata = sealed(text, json.dumps(base_print))
        safetensors.torch.save_file(tensors, staging / SAFE_WEIGHTS_NAME, metadata=metadata)
        if config.base_folder and not (folder / config.base_folder).is_dir():
            keywords = {k: v for k, v in kwargs.items() if k in BASE_KEYWORDS}
            with as_base(model) as base:
                base.save_pretrained(staging / config.base_folder, **keywords)


def _write_for_auto_classes(model: MixtureModel, config: MoeLoraConfig, staging: Path) -> None:
    """`config.json`, and the module that it names, which imports the classes."""
    public = public_class(type(model))
    names = {"AutoConfig": MoeLoraConfig.__name__, model.auto_class.__name__: public.__name__}
    fields = {
        **config.own_fields(),
        # A class of transformers: `transformers serve` and TRL load by what they find there.
        "architectures": [model.auto_class.__name__],
        "auto_map": {auto: f"{MODULE}.{name}" for auto, name in names.items()},
    }
    text = json.dumps(fields, indent=2) + "\n"
    (staging / CONFIG_NAME).write_text(text, encoding="utf-8")
    imported = f"from moelora import {', '.join(sorted(names.values()))}  # noqa: F401\n"
    (staging / f"{MODULE}.py").write_text(imported, encoding="utf-8")


def prepare_upload(model: MixtureModel, folder: str | os.PathLike[str]) -> None:
    """Rewrite what `save_pretrained` wrote into `folder` as it goes to the hub."""
    save(model, folder, for_hub=True)


def _described(model: MixtureModel, folder: Path) -> MoeLoraConfig:
    """A copy of the mixture's configuration that also says which base it belongs to."""
    config = copy.deepcopy(model.moelora_config)
    base = model.config.to_diff_dict()
    base.pop("keys_to_ignore_at_inference", None)
    if not is_quantised_at_load(model):
        # The base's own folder says it, if any does.
        base.pop(HOW, None)
    base["dtype"] = str(model.dtype).removeprefix("torch.")
    config.base_config = base
    config.base_architecture = base_class(type(model)).__name__
    # Where its base was loaded from this folder, that is part of the new checkpoint, too.
    name = config.base_model_name_or_path
    origin = Path(name or "", config.base_subfolder or "").resolve()
    is_inside = name and origin.parent == folder.resolve() and origin.is_dir()
    config.base_folder = origin.name if is_inside and BASE_FOLDER.fullmatch(origin.name) else None
    return config


@contextmanager
def as_base(model: MixtureModel) -> Iterator[PreTrainedModel]:
    """`model` with its base's class and without the mixture's tensors, while inside; hooks stay."""
    restore = snapshot(model)
    try:
        take_out_parts(model)
        model.config.__dict__.pop("keys_to_ignore_at_inference", None)
        model.__dict__.pop(PEFT_ATTACHED, None)
        model.__class__ = base_class(type(model))  # type: ignore[assignment]
        yield model
    finally:
        restore()


def _check_keywords(kwargs: Mapping[str, Any]) -> None:
    if kwargs.get("push_to_hub"):
        raise ValueError(
            "save_pretrained(push_to_hub=True) is not supported: call model.push_to_hub(repo_id), "
            "or save (with save_base=True where the base is not public) and `hf upload` it."
        )
    unknown = sorted(set(kwargs) - BASE_KEYWORDS - IDLE_KEYWORDS - {"push_to_hub"})
    if unknown:
        raise TypeError(
            f"save_pretrained has no keyword {unknown}. It takes save_directory, is_main_process, "
            f"state_dict, save_base, and for the base {', '.join(sorted(BASE_KEYWORDS))}."
        )


def _check_no_adapter(model: MixtureModel) -> None:
    """Raise ValueError where PEFT has put an adapter inside, which a checkpoint would not hold."""
    try:
        check_no_peft(model)
    except ValueError as error:
        raise ValueError(
            f"This mixture cannot be saved with an adapter beside its experts: {error} An adapter "
            "alone is saved by PeftModel.save_pretrained, where get_peft_model put it on top."
        ) from error


def _check_nothing_foreign(folder: Path) -> None:
    """Raise ValueError where a model that moelora did not write would be overwritten."""
    ours = {name: is_ours(folder, name) for name in (CONFIG_NAME, SAFE_WEIGHTS_NAME)}
    foreign = [name for name, is_own in ours.items() if is_own is False]
    if True not in ours.values():
        # Neither a config.json nor weights of ours: a damaged file may be anybody's.
        others = (SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_NAME, WEIGHTS_INDEX_NAME)
        foreign = [name for name in (*ours, *others) if (folder / name).exists()]
    if foreign:
        raise ValueError(
            f"{folder} holds a model that moelora did not write ({', '.join(foreign)}), perhaps "
            "the base itself: saving there would overwrite it. Save into another folder."
        )
