"""Loading a checkpoint: read and check everything, load the base, put the experts in, or change
nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import fields
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel
from transformers.utils import GENERATION_CONFIG_NAME, SAFE_WEIGHTS_NAME
from transformers.utils.hub import cached_file

from ..config import MoeLoraConfig
from ..core.model import MixtureModel, rename
from ..host_internals import AUTO_KEYWORDS, attention_of
from ..injection.base import ACCESS, base_for
from ..injection.inject import put_into
from ..injection.modules import site_device
from ..injection.offloading import check_slots, offload
from ..routers import changed_options
from ..validation import json_object
from .quantisation import as_it_was
from .reading import read
from .state import differences, layout, load_state_dict, misfits

# What may be another at loading than it was at saving: the tensors mean the same.
CHANGEABLE = (
    "num_experts_per_tok",
    "norm_topk_prob",
    "lora_alpha",
    "lora_dropout",
    "expert_dropout",
    "router_options",
    "router_prefix_tokens",
    "router_jitter_noise",
    "router_aux_loss_coef",
    "router_z_loss_coef",
    "router_aux_loss_window",
    "router_bias_update_rate",
    "expert_target_loss_coef",
)


def load(
    cls: type[MixtureModel],
    folder: str | PathLike[str],
    config: MoeLoraConfig | None = None,
    *,
    base: str | PathLike[str] | PreTrainedModel | None = None,
    allow_base_mismatch: bool = False,
    output_loading_info: bool = False,
    resident_experts: int | None = None,
    **kwargs: Any,
) -> MixtureModel | tuple[MixtureModel, dict[str, Any]]:
    """Load a checkpoint folder or hub repository; see `MoeLoraModel.from_pretrained`.

    config: what the Auto class read from config.json and changed by the caller's keywords.
    kwargs: fields in `CHANGEABLE`, and what goes to the base's `from_pretrained`.
    """
    kwargs = {name: value for name, value in kwargs.items() if name not in AUTO_KEYWORDS}
    if resident_experts is not None:
        check_slots(resident_experts)
    _join_dtypes(kwargs)
    found_by = {k: kwargs.pop(k) for k in (*ACCESS, "revision", "subfolder") if k in kwargs}
    path = _weights_file(folder, found_by)
    # The configuration of these weights; config.json may be of another moment.
    tensors, saved, base_print = read(path)
    generation = None if cls.is_classifier else _generation_config(folder, found_by)
    changes = _changes(str(folder), saved, config, kwargs)
    trained_on = saved.base_model_name_or_path
    where, keywords = _where_base(folder, found_by, saved, base, kwargs)
    model, info = _load_base(cls, str(folder), where, saved, keywords)
    if not allow_base_mismatch:
        _check_same_base(
            f"{folder} was trained on ({trained_on})", model, saved, base_print, tensors
        )
    for name, value in changes.items():
        setattr(saved, name, value)
    saved.validate()

    fill = partial(_fill, tensors=tensors, resident=resident_experts)
    try:
        restored = put_into(model, saved, cls, then=fill, has_rows=False).eval()
    except (ValueError, AttributeError) as error:
        # AttributeError: it names a module that this base lacks.
        raise ValueError(f"{path} does not fit: {error}") from error
    rename(restored, str(folder))
    if generation is not None and restored.can_generate():
        restored.generation_config = generation
    return (restored, info) if output_loading_info else restored


def _fill(model: MixtureModel, tensors: dict[str, Tensor], resident: int | None) -> None:
    """Put the file's tensors in, offloaded where few experts are to be `resident`."""
    if wrong := misfits(layout(model), tensors):
        raise ValueError(f"{'; '.join(wrong[:6])} ({len(wrong)} in all).")
    if resident is None:
        _make_rows(model)
        load_state_dict(model, tensors)
    else:
        _adopt(model, tensors)
        offload(model, resident)


def _make_rows(model: MixtureModel) -> None:
    """Give the factors, which are on the meta device, memory where their site computes."""
    for site in model.moelora.sites.values():
        device = site_device(model, site.names)
        for factor in site.factors():
            rows = torch.empty_like(factor.get_parameter("weight"), device=device)
            factor.weight = nn.Parameter(rows)


def _adopt(model: MixtureModel, tensors: Mapping[str, Tensor]) -> None:
    """Make the file's tensors the factors' rows, which stay in the file until they are read; all
    others are copied.
    """
    others = dict(tensors)
    for key, factor in model.moelora.named_factors():
        rows = others.pop(f"{key}.weight").to(factor.get_parameter("weight").dtype)
        factor.weight = nn.Parameter(rows)
    nn.Module.load_state_dict(model, others, strict=False)
    model.moelora.has_values = True


def _join_dtypes(kwargs: dict[str, Any]) -> None:
    """`torch_dtype` is transformers' former name of `dtype`."""
    given = kwargs.pop("torch_dtype", None)
    if given is None:
        return
    dtype = kwargs.setdefault("dtype", given)
    if str(dtype).removeprefix("torch.") != str(given).removeprefix("torch."):
        raise ValueError(
            f"dtype={dtype} and torch_dtype={given} are two names of one thing: pass dtype alone."
        )


def _weights_file(folder: str | PathLike[str], found_by: Mapping[str, Any]) -> Path:
    """The path of the checkpoint's weights, downloaded if need be."""
    if not isinstance(folder, (str, PathLike)):
        raise TypeError(
            f"pretrained_model_name_or_path={folder!r} is a {type(folder).__name__}; expected the "
            "folder that save_pretrained wrote, or the id of its repository."
        )
    try:
        return Path(cached_file(str(folder), SAFE_WEIGHTS_NAME, **found_by))  # type: ignore[arg-type]
    except OSError as error:
        # Of a repository on the hub it says itself what is wrong.
        if not Path(folder).is_dir():
            raise
        raise ValueError(
            f"{folder} holds no {SAFE_WEIGHTS_NAME}: it is not a (whole) moelora checkpoint."
        ) from error


def _generation_config(
    folder: str | PathLike[str], found_by: Mapping[str, Any]
) -> GenerationConfig | None:
    try:
        path = Path(cached_file(str(folder), GENERATION_CONFIG_NAME, **found_by))  # type: ignore[arg-type]
    except OSError:
        return None
    try:
        return GenerationConfig.from_dict(json_object(path))
    except Exception as error:
        # Its values are checked by transformers, with errors of many kinds.
        raise ValueError(f"{path} is not a generation configuration: {error}") from error


def _changes(
    folder: str, saved: MoeLoraConfig, given: MoeLoraConfig | None, kwargs: dict[str, Any]
) -> dict[str, Any]:
    """What the caller wants other than saved; `AutoConfig` has put it into `given`, else it is in
    `kwargs`.

    Keywords of the base that AutoConfig kept for itself go back into `kwargs`.
    """
    own = MoeLoraConfig.field_names()
    changed = kwargs
    if given is not None:
        # Not what config.json says now: another save may have replaced it.
        before = getattr(given, "as_read", saved) if given.name_or_path == folder else saved
        names = {f.name for f in fields(given)} | {"output_attentions"}
        names -= {"transformers_version", "architectures"}
        changed = {n: getattr(given, n) for n in names if getattr(given, n) != getattr(before, n)}
        if attention_of(given) is not None:
            kwargs.setdefault("attn_implementation", attention_of(given))
    asked = {name: changed.pop(name) for name in own if name in changed}
    for name, value in changed.items():
        kwargs.setdefault(name, value)
    if "router_options" in asked:
        asked["router_options"] = changed_options(
            saved.router, saved.router_options, asked["router_options"]
        )
    fixed = sorted(n for n in asked if n not in CHANGEABLE and asked[n] != getattr(saved, n))
    if fixed:
        raise ValueError(
            f"{', '.join(fixed)} cannot be changed when loading {folder}, which was trained with "
            f"what it says. These can: {', '.join(CHANGEABLE)}."
        )
    return asked


def _where_base(
    folder: str | PathLike[str],
    found_by: Mapping[str, Any],
    saved: MoeLoraConfig,
    base: str | PathLike[str] | PreTrainedModel | None,
    kwargs: dict[str, Any],
) -> tuple[Any, dict[str, Any]]:
    """The base, or its id or folder as given, inside the checkpoint or named by it; and the
    keywords for its `from_pretrained`.
    """
    if isinstance(base, PreTrainedModel):
        # Whose code is trusted already.
        unused = {"trust_remote_code", *(name for name in kwargs if kwargs[name] is None)}
        return base, {name: value for name, value in kwargs.items() if name not in unused}
    keywords = {name: found_by[name] for name in ACCESS if name in found_by} | kwargs
    if saved.base_config is not None:
        keywords.setdefault("dtype", saved.base_config.get("dtype"))
    if base is not None:
        return base, keywords
    if saved.base_folder is not None:
        inside = Path(found_by.get("subfolder") or "", saved.base_folder)
        if Path(folder).is_dir():
            return Path(folder, inside), keywords
        keywords |= {"subfolder": inside.as_posix(), "revision": found_by.get("revision")}
        return str(folder), keywords
    if not saved.base_model_name_or_path:
        raise ValueError(
            f"{folder} names no base: it was saved from a model that was made in memory. Pass "
            "base=… (a folder, an id or a loaded model), or save with save_base=True."
        )
    keywords |= {"subfolder": saved.base_subfolder or "", "revision": saved.base_revision}
    return saved.base_model_name_or_path, keywords


def _load_base(
    cls: type[MixtureModel], folder: str, where: Any, saved: MoeLoraConfig, keywords: dict[str, Any]
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The base of the checkpoint in `folder`, and its loading info."""
    try:
        if not isinstance(where, PreTrainedModel):
            keywords = as_it_was(where, saved, keywords)
        return base_for(cls, where, saved, keywords)
    except OSError as error:
        raise OSError(
            f"The base of {folder}, {where}, cannot be loaded ({error}). "
            "Pass base=… with where it is now."
        ) from error
    except ImportError as error:
        raise ImportError(
            f"The base of {folder}, {where}, cannot be loaded as it was quantised ({error}). Pass "
            "one that is loaded otherwise: base=AutoModelForCausalLM.from_pretrained(…)."
        ) from error


def _check_same_base(
    expected: str,
    model: PreTrainedModel,
    saved: MoeLoraConfig,
    base_print: Mapping[str, Any],
    excluded: Iterable[str],
) -> None:
    """Raise ValueError where `model` is not the `expected` base, with what differs."""
    own_type = model.config.model_type
    saved_type = (saved.base_config or {}).get("model_type", own_type)
    differing = [
        f"it is a {own_type!r} model; the experts in the checkpoint belong to a {saved_type!r} "
        f"({saved.base_architecture})"
    ]
    if own_type == saved_type:
        differing = differences(base_print, model, excluded)
    if differing:
        raise ValueError(
            f"The base ({model.config.name_or_path or type(model).__name__}) is not the one that "
            f"{expected}: {'; '.join(differing)}. Pass base=… with the right one, or "
            "allow_base_mismatch=True to load the experts onto this one all the same."
        )
