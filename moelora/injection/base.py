"""The base that takes a mixture: found or loaded, of the right kind, and given back as it was."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from os import PathLike
from pathlib import Path
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES as CLASSIFIERS,
)
from transformers.utils import CONFIG_NAME
from transformers.utils.hub import cached_file, extract_commit_hash

from ..config import MoeLoraConfig
from ..core.model import MixtureModel
from .parallel import check_not_to_be_sharded, check_whole

# The keywords that say how a repository on the hub is reached.
ACCESS = ("cache_dir", "force_download", "local_files_only", "proxies", "token")
# What transformers' from_pretrained returns beside the model, empty for a base that was given.
LOADING_INFO = ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")


def base_for(
    public: type[MixtureModel], base: Any, config: MoeLoraConfig, kwargs: dict[str, Any]
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The base, given or loaded with `kwargs`, fit to take a mixture, and its loading info.

    `config` notes where it came from, a folder by its whole path.

    Raises:
        ValueError, TypeError: a base of the wrong kind, or keywords beside a loaded one.
    """
    if isinstance(base, PreTrainedModel):
        if kwargs:
            raise ValueError(
                f"{sorted(kwargs)} are for from_pretrained; the base is loaded already: drop them."
            )
        name = base.config.name_or_path or ""
        model = base
        info: dict[str, Any] = {part: [] for part in LOADING_INFO}
    elif isinstance(base, (str, PathLike)):
        name = str(base)
        check_not_to_be_sharded(kwargs)
        kwargs["revision"] = _commit_of(name, kwargs)
        model, info = public.auto_class.from_pretrained(base, output_loading_info=True, **kwargs)
    else:
        raise TypeError(
            f"base is a {type(base).__name__}; expected a hub id, a folder or a PreTrainedModel "
            "(of a PeftModel, pass model.merge_and_unload() or model.unload())."
        )
    check_base(public, model)
    # Now, not when the model is saved: by then the process may work in another folder.
    is_folder = name != "" and Path(name).is_dir()
    config.base_model_name_or_path = str(Path(name).resolve()) if is_folder else name or None
    config.base_subfolder = kwargs.get("subfolder") or None
    config.base_revision = kwargs.get("revision")
    return model, info


def check_base(public: type[MixtureModel], model: PreTrainedModel) -> None:
    """Raise ValueError or TypeError where `model` cannot take a mixture of the class `public`."""
    if isinstance(model, MixtureModel):
        raise ValueError("The base holds a mixture already; take it out with model.unload() first.")
    check_no_peft(model)
    check_whole(model)
    name = type(model).__name__
    if model.config.is_encoder_decoder:
        raise ValueError(
            f"{name} is an encoder-decoder, whose encoder and decoder read different tokens: a "
            "mixture routes the tokens of one stack. Use a decoder-only model, or an encoder with "
            "a classification head."
        )
    classifier = name in CLASSIFIERS.values() or name.endswith("ForSequenceClassification")
    if public.is_classifier and not classifier:
        raise TypeError(f"{name} is not a sequence classifier; use MoeLoraForCausalLM for it.")
    if not public.is_classifier and (classifier or model.get_output_embeddings() is None):
        raise TypeError(
            f"{name} does not have a language modelling head; expected a causal language model "
            "(for a classifier use MoeLoraForSequenceClassification)."
        )


def check_no_peft(model: nn.Module) -> None:
    """Raise ValueError where PEFT has put adapters into `model`."""
    if any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise ValueError(
            f"This {type(model).__name__} has PEFT adapters inside: merge or unload them first "
            "(PeftModel.merge_and_unload(), PeftModel.unload(); model.delete_adapter(name))."
        )


def snapshot(model: PreTrainedModel) -> Callable[[], None]:
    """What gives `model` back all that it is now, but for its weights' values: its class, its
    settings, every module's attributes, submodules, buffers and hooks, and what trains.
    """
    cls = type(model)
    contents: list[dict[str, Any]] = [vars(model.config)]
    for module in model.modules():
        # Submodules, buffers and hooks lie in dicts among the attributes.
        contents += [vars(module), *(v for v in vars(module).values() if isinstance(v, dict))]
    before = [(own, dict(own)) for own in contents]
    trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]

    def restore() -> None:
        model.__class__ = cls
        for own, then in before:
            own.clear()
            own.update(then)
        for parameter, requires_grad in trained:
            parameter.requires_grad_(requires_grad)

    return restore


def _commit_of(base: str, kwargs: Mapping[str, Any]) -> str | None:
    """The commit of the hub repository `base` that the keywords mean, as far as it is known."""
    revision = kwargs.get("revision")
    if Path(base).is_dir():
        return revision
    where = {k: kwargs[k] for k in (*ACCESS, "subfolder") if kwargs.get(k) is not None}
    try:
        config = cached_file(base, CONFIG_NAME, revision=revision, **where)
    except OSError:
        # Loading it says what is wrong, and better.
        return revision
    return extract_commit_hash(config, None) or revision
