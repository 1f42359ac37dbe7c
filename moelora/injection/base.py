"""The base that takes a mixture: found or loaded, and of the right kind."""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES as CLASSIFIERS,
)
from transformers.utils import CONFIG_NAME
from transformers.utils.hub import cached_file, extract_commit_hash

from ..config import MoeLoraConfig
from ..core.model import MixtureModel
from .targets import has_peft_layers

# The keywords that say how a repository on the hub is reached.
ACCESS = ("cache_dir", "force_download", "local_files_only", "proxies", "token")


def base_for(
    public: type[MixtureModel], base: Any, config: MoeLoraConfig, kwargs: dict[str, Any]
) -> PreTrainedModel:
    """The base, loaded and fit to take a mixture; `config` notes where it came from.

    Args:
        public: the class of ours that it is to become an instance of.
        base: a hub id, a folder, or a loaded model.
        config: of the mixture.
        kwargs: for the base's `from_pretrained`.

    Raises:
        ValueError, TypeError: a base of the wrong kind, or keywords beside a loaded one.
    """
    if isinstance(base, PreTrainedModel):
        if kwargs:
            raise ValueError(
                f"{sorted(kwargs)} go to from_pretrained, but the base is loaded already: drop "
                "them."
            )
        model = base
        note_origin(config, base)
    elif isinstance(base, str) or hasattr(base, "__fspath__"):
        kwargs["revision"] = commit_of(base, kwargs)
        note_origin(config, base, kwargs.get("subfolder"), kwargs["revision"])
        model = public.auto_class.from_pretrained(base, **kwargs)
    else:
        raise TypeError(
            f"base is a {type(base).__name__}; expected a hub id, a folder or a PreTrainedModel "
            "(of a PeftModel, pass model.merge_and_unload() or model.unload())."
        )
    check_base(public, model)
    return model


def check_base(public: type[MixtureModel], model: PreTrainedModel) -> None:
    """Raise ValueError or TypeError where `model` cannot take a mixture of the class `public`."""
    if isinstance(model, MixtureModel):
        raise ValueError("The base holds a mixture already; take it out with model.unload() first.")
    if has_peft_layers(model):
        raise ValueError(
            f"This {type(model).__name__} has PEFT adapters inside: merge or unload them first "
            "(PeftModel.merge_and_unload(), PeftModel.unload(); model.delete_adapter(name))."
        )
    name = type(model).__name__
    classifier = name in CLASSIFIERS.values() or name.endswith("ForSequenceClassification")
    if public.is_classifier and not classifier:
        raise TypeError(f"{name} is not a sequence classifier; use MoeLoraForCausalLM for it.")
    if not public.is_classifier and (classifier or model.get_output_embeddings() is None):
        raise TypeError(
            f"{name} does not have a language modelling head; expected a causal language model "
            "(for a classifier use MoeLoraForSequenceClassification)."
        )


def commit_of(base: str | PathLike[str], kwargs: Mapping[str, Any]) -> str | None:
    """The commit of the hub repository `base` that the keywords mean, as far as it is known."""
    revision = kwargs.get("revision")
    if Path(base).is_dir():
        return revision
    where = {k: kwargs[k] for k in (*ACCESS, "subfolder") if kwargs.get(k) is not None}
    try:
        config = cached_file(str(base), CONFIG_NAME, revision=revision, **where)
    except OSError:
        # Loading it says what is wrong, and better.
        return revision
    return extract_commit_hash(config, None) or revision


def note_origin(
    config: MoeLoraConfig,
    base: str | PathLike[str] | PreTrainedModel,
    subfolder: str | None = None,
    revision: str | None = None,
) -> None:
    """Write into `config` where its base came from; a folder by its whole path.

    Now, not when the model is saved: by then the process may work in another folder.

    Args:
        config: the mixture's configuration; its fields `base_model_name_or_path`,
            `base_subfolder` and `base_revision` are set.
        base: a hub id, a folder, or a loaded model, which knows its id or folder or was made in
            memory.
        subfolder: where in `base` its files lie.
        revision: the commit, for a hub id.
    """
    loaded = isinstance(base, PreTrainedModel)
    name = base.config.name_or_path or "" if loaded else str(base)
    is_folder = bool(name) and Path(name).is_dir()
    config.base_model_name_or_path = str(Path(name).resolve()) if is_folder else name or None
    config.base_subfolder = subfolder
    config.base_revision = revision
