"""Loading a checkpoint: read and check everything, load the base, put the experts in, or change
nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from os import PathLike
from typing import Any

from torch import Tensor
from transformers import AutoConfig, GenerationConfig, PreTrainedModel
from transformers.utils import GENERATION_CONFIG_NAME, SAFE_WEIGHTS_NAME

from ..config import MoeLoraConfig
from ..core.model import MixtureModel
from ..host_internals import AUTO_KEYWORDS, attention_of
from ..injection.base import check_base, note_origin
from ..injection.inject import put_into
from ..routers import changed_options
from .fingerprint import differences
from .origin import Source
from .reading import read, read_json
from .state import layout, load_state_dict

# What may be another at loading than it was at saving: the tensors mean the same.
CHANGEABLE = (
    "num_experts_per_tok",
    "norm_topk_prob",
    "lora_alpha",
    "lora_dropout",
    "router_options",
    "router_prefix_tokens",
    "router_jitter_noise",
    "router_aux_loss_coef",
    "router_z_loss_coef",
    "router_aux_loss_window",
    "router_bias_update_rate",
    "expert_target_loss_coef",
)
# What transformers' from_pretrained returns beside the model, empty for a base that was given.
NOTHING_MISSING = ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")


def load(
    cls: type[MixtureModel],
    folder: str | PathLike[str],
    config: MoeLoraConfig | None = None,
    *,
    base: str | PathLike[str] | PreTrainedModel | None = None,
    allow_base_mismatch: bool = False,
    output_loading_info: bool = False,
    **kwargs: Any,
) -> MixtureModel | tuple[MixtureModel, dict[str, Any]]:
    """Load a checkpoint folder or hub repository; see `MoeLoraModel.from_pretrained`.

    Args:
        cls: the public class to load.
        folder: the checkpoint's folder, or the id of its repository.
        config: what the Auto class read from config.json and changed by the caller's keywords.
        base: a folder, id or loaded model to use instead of the one that the checkpoint names.
        allow_base_mismatch: take a base whose weights are not the ones that the experts were
            trained on.
        output_loading_info: return the model and what transformers says about the base's keys.
        kwargs: fields in `CHANGEABLE`, and what goes to the base's `from_pretrained`.

    Raises:
        ValueError: not a checkpoint, a damaged or newer one, or another base, with what differs.
        TypeError: `folder` is not a path or an id.
        OSError: the base that the checkpoint names cannot be loaded.
    """
    kwargs = {name: value for name, value in kwargs.items() if name not in AUTO_KEYWORDS}
    _join_dtypes(kwargs)
    source = Source(folder, kwargs)
    path = source.file(SAFE_WEIGHTS_NAME)
    if path is None:
        raise ValueError(
            f"{folder} holds no {SAFE_WEIGHTS_NAME}: it is not a moelora checkpoint, or not a "
            "whole one."
        )
    # The configuration of these weights; config.json may be of another moment.
    tensors, saved, base_print = read(path)
    generation = None if cls.is_classifier else _generation_config(source)
    changes = _changes(source, saved, config, kwargs)
    trained_on = saved.base_model_name_or_path
    model, info = _load_base(cls, source, saved, base, kwargs, allow_base_mismatch)
    check_base(cls, model)
    if not allow_base_mismatch and (differing := differences(base_print, model, tensors)):
        raise ValueError(
            f"The base ({model.config.name_or_path or type(model).__name__}) is not the one that "
            f"{folder} was trained on ({trained_on}): {'; '.join(differing)}. Pass base=… with the "
            "right one, or allow_base_mismatch=True to load the experts onto this one all the same."
        )
    for name, value in changes.items():
        setattr(saved, name, value)
    saved.validate()
    try:
        restored = _put_into(cls, model, saved, tensors).eval()
    except (ValueError, AttributeError) as error:
        # AttributeError: it names a module that this base lacks.
        raise ValueError(f"{path} does not fit: {error}") from error
    if generation is not None and restored.can_generate():
        restored.generation_config = generation
    return (restored, info) if output_loading_info else restored


def _join_dtypes(kwargs: dict[str, Any]) -> None:
    """`torch_dtype` is transformers' former name of `dtype`."""
    if kwargs.get("torch_dtype") is None:
        kwargs.pop("torch_dtype", None)
        return
    given = kwargs.pop("torch_dtype")
    dtype = kwargs.setdefault("dtype", given)
    if str(dtype).removeprefix("torch.") != str(given).removeprefix("torch."):
        raise ValueError(
            f"dtype={dtype} and torch_dtype={given} are two names of one thing: pass dtype alone."
        )


def _generation_config(source: Source) -> GenerationConfig | None:
    path = source.file(GENERATION_CONFIG_NAME)
    if path is None:
        return None
    settings = read_json(path)
    try:
        return GenerationConfig.from_dict(settings)
    except Exception as error:
        # Its values are checked by transformers, with errors of many kinds.
        raise ValueError(f"{path} is not a generation configuration: {error}") from error


def _changes(
    source: Source, saved: MoeLoraConfig, given: MoeLoraConfig | None, kwargs: dict[str, Any]
) -> dict[str, Any]:
    """What the caller wants other than saved; `AutoConfig` has put it into `given`, else it is in
    `kwargs`.

    Keywords of the base that AutoConfig kept for itself go back into `kwargs`.
    """
    own = MoeLoraConfig.field_names()
    if given is None:
        asked = {name: kwargs.pop(name) for name in own if name in kwargs}
    else:
        # Not what config.json says now: another save may have replaced it.
        own_file = given.name_or_path == source.name
        before = getattr(given, "as_read", saved) if own_file else saved
        asked = {n: getattr(given, n) for n in own if getattr(given, n) != getattr(before, n)}
        inherited = {f.name for f in fields(given)} | {"output_attentions"}
        for name in inherited - {*own, "transformers_version", "architectures"}:
            if getattr(given, name) != getattr(before, name):
                kwargs.setdefault(name, getattr(given, name))
        if attention_of(given) is not None:
            kwargs.setdefault("attn_implementation", attention_of(given))
    if "router_options" in asked:
        asked["router_options"] = changed_options(
            saved.router, saved.router_options, asked["router_options"]
        )
    fixed = sorted(
        name for name in asked if name not in CHANGEABLE and asked[name] != getattr(saved, name)
    )
    if fixed:
        raise ValueError(
            f"{', '.join(fixed)} cannot be changed when loading {source.name}: the experts and "
            "routers in it were trained with what it says. These can: "
            f"{', '.join(CHANGEABLE)}."
        )
    return {name: value for name, value in asked.items() if name in CHANGEABLE}


def _load_base(
    cls: type[MixtureModel],
    source: Source,
    config: MoeLoraConfig,
    base: str | PathLike[str] | PreTrainedModel | None,
    kwargs: dict[str, Any],
    allow_mismatch: bool,
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The base, given, inside the checkpoint or named by it, and transformers' loading info; its
    origin is noted in `config`.
    """
    if isinstance(base, PreTrainedModel):
        surplus = sorted(k for k, v in kwargs.items() if v is not None and k != "trust_remote_code")
        if surplus:
            raise ValueError(
                f"{surplus} go to from_pretrained, but the base is loaded already: drop them."
            )
        if not allow_mismatch:
            _check_architecture(base.config.model_type, type(base).__name__, source, config)
        note_origin(config, base)
        return base, {name: [] for name in NOTHING_MISSING}
    where, found_by = _where_base(source, config, base)
    trust = {k: kwargs[k] for k in ("trust_remote_code",) if k in kwargs}
    try:
        architecture = AutoConfig.from_pretrained(where, **found_by, **trust)
    except OSError as error:
        raise OSError(
            f"The base of {source.name}, {where}, cannot be loaded ({error}). "
            "Pass base=… with where it is now."
        ) from error
    if not allow_mismatch:
        _check_architecture(architecture.model_type, where, source, config)
    if config.base_config is not None:
        kwargs.setdefault("dtype", config.base_config.get("dtype"))
    note_origin(config, where, found_by.get("subfolder"), found_by.get("revision"))
    return cls.auto_class.from_pretrained(where, output_loading_info=True, **found_by, **kwargs)


def _where_base(
    source: Source, config: MoeLoraConfig, base: str | PathLike[str] | None
) -> tuple[str, dict[str, Any]]:
    """The base's id or folder, and the keywords that find it."""
    if base is not None:
        return str(base), source.access
    if config.base_folder is not None:
        where, found_by = source.base(config.base_folder)
    elif config.base_model_name_or_path:
        where = config.base_model_name_or_path
        found_by = {"revision": config.base_revision, "subfolder": config.base_subfolder}
    else:
        raise ValueError(
            f"{source.name} names no base: it was saved from a model that was made in memory. Pass "
            "base=… (a folder, an id or a loaded model), or save with save_base=True."
        )
    return where, {**source.access, **{k: v for k, v in found_by.items() if v is not None}}


def _check_architecture(model_type: str, where: str, source: Source, config: MoeLoraConfig) -> None:
    expected = (config.base_config or {}).get("model_type", model_type)
    if model_type != expected:
        raise ValueError(
            f"{where} is a {model_type!r} model; the experts in {source.name} belong to a "
            f"{expected!r} ({config.base_architecture}). Pass base=… with the right one."
        )


def _put_into(
    cls: type[MixtureModel],
    base: PreTrainedModel,
    config: MoeLoraConfig,
    tensors: Mapping[str, Tensor],
) -> MixtureModel:
    """`base` with the mixture that the tensors are; unchanged after an error."""

    def restore(model: MixtureModel) -> None:
        _check(model, tensors)
        load_state_dict(model, tensors)

    return put_into(base, config, cls, then=restore)


def _check(model: MixtureModel, tensors: Mapping[str, Tensor]) -> None:
    """Raise ValueError unless the tensors are those of `model`, each of its shape and kind; nothing
    is loaded before.
    """
    expected = layout(model)
    wrong = [f"{key} is missing" for key in expected if key not in tensors]
    for key, tensor in tensors.items():
        own = expected.get(key)
        if own is None:
            wrong.append(f"{key} is unknown")
        elif tensor.shape != own.shape:
            wrong.append(f"{key} is {list(tensor.shape)}, expected {list(own.shape)}")
        elif tensor.dtype != own.dtype and not (
            tensor.is_floating_point() and own.is_floating_point()
        ):
            wrong.append(f"{key} has {tensor.dtype}, expected {own.dtype}")
    if wrong:
        raise ValueError(f"{'; '.join(wrong[:6])} ({len(wrong)} in all).")
