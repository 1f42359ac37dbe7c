"""Loading a checkpoint: read and check everything, load the base, put the experts in, or change
nothing.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoConfig, GenerationConfig, PreTrainedModel
from transformers.utils import CONFIG_NAME, GENERATION_CONFIG_NAME, SAFE_WEIGHTS_NAME
from transformers.utils.hub import cached_file, extract_commit_hash

from ..config import FORMAT_VERSION, MoeLoraConfig
from ..routers import changed_options
from .fingerprint import differences
from .save import PREFIX, trained_keys

if TYPE_CHECKING:
    from ..modeling import MoeLoraModel

ACCESS = ("cache_dir", "force_download", "local_files_only", "proxies", "token")
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


class Source:
    """Where a checkpoint lies: a local folder, or a repository on the hub. Takes its keywords out
    of `kwargs`.
    """

    def __init__(self, name: str | Path, kwargs: dict[str, Any]):
        self.name = str(name)
        self.access = {k: kwargs.pop(k) for k in ACCESS if k in kwargs}
        self.revision = kwargs.pop("revision", None)
        self.subfolder = kwargs.pop("subfolder", None) or ""
        self.folder = Path(name) / self.subfolder if Path(name).is_dir() else None

    def file(self, name: str) -> Path | None:
        """The path of a file of the checkpoint, downloaded if need be, or None where there is none."""
        if self.folder is not None:
            return self.folder / name if (self.folder / name).is_file() else None
        where = {"revision": self.revision, "subfolder": self.subfolder, **self.access}
        try:
            found = cached_file(self.name, name, **where)
        except OSError:
            if name == SAFE_WEIGHTS_NAME:
                raise
            return None
        return None if found is None else Path(found)

    def base(self, folder: str) -> tuple[str, dict[str, Any]]:
        """Where the base inside the checkpoint lies, and the keywords that find it."""
        if self.folder is not None:
            return str(self.folder / folder), {}
        inside = f"{self.subfolder}/{folder}" if self.subfolder else folder
        return self.name, {"subfolder": inside, "revision": self.revision}


def commit_of(base: str | Path, kwargs: Mapping[str, Any]) -> str | None:
    """The commit of the hub repository `base` that the keywords mean; what they say where it is not
    known.
    """
    revision = kwargs.get("revision")
    if Path(base).is_dir():
        return revision
    where = {k: kwargs[k] for k in (*ACCESS, "subfolder") if kwargs.get(k) is not None}
    try:
        return (
            extract_commit_hash(
                cached_file(str(base), CONFIG_NAME, revision=revision, **where), None
            )
            or revision
        )
    except OSError:
        # Loading it says what is wrong, and better.
        return revision


def load(
    cls: type[MoeLoraModel], folder: str | Path, config: MoeLoraConfig | None, **kwargs
) -> Any:
    """Load a checkpoint folder or hub repository; see `MoeLoraModel.from_pretrained`."""
    base = kwargs.pop("base", None)
    allow_mismatch = kwargs.pop("allow_base_mismatch", False)
    for name in ("_from_auto", "adapter_kwargs"):
        kwargs.pop(name, None)
    source = Source(folder, kwargs)
    path = source.file(SAFE_WEIGHTS_NAME)
    if path is None:
        raise ValueError(
            f"{folder} holds no {SAFE_WEIGHTS_NAME}: it is no moelora checkpoint, or not a whole one."
        )
    tensors, saved, print_ = read(path)
    # The header's configuration belongs to these weights; the file beside it may be of another
    # moment.
    changes = _changes(source, saved, config, kwargs)
    model = _load_base(cls, source, saved, base, kwargs, allow_mismatch)
    cls._check_base(model)
    found = differences(print_, model, [k for k in tensors if not k.startswith(PREFIX)])
    if found and not allow_mismatch:
        raise ValueError(
            f"The base ({model.config._name_or_path or type(model).__name__}) is not the one that {folder} "
            f"was trained on ({saved.base_model_name_or_path}): {'; '.join(found)}. Pass base=… with the "
            "right one, or allow_base_mismatch=True to load the experts onto this one all the same."
        )

    def restore(restored: Any) -> None:
        _check(restored, tensors, path)
        restored.load_state_dict(tensors)

    for name, value in changes.items():
        setattr(saved, name, value)
    saved.validate()
    restored = cls.put_into(model, saved, then=restore)
    if restored.can_generate() and (generation := source.file(GENERATION_CONFIG_NAME)) is not None:
        restored.generation_config = GenerationConfig.from_pretrained(generation.parent)
    return restored.eval()


def read(path: Path) -> tuple[dict[str, Tensor], MoeLoraConfig, dict[str, Any]]:
    """The tensors, configuration and base fingerprint of a checkpoint's `model.safetensors`.

    Raises:
        ValueError: the file is damaged, no checkpoint of this package, or of a newer format.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118 - a file is no dict  # noqa: SIM118 (it is no dict)
    except SafetensorError as error:
        raise ValueError(
            f"{path} is damaged or cut short ({error}): copy it again, or use an older checkpoint."
        ) from error
    if "moelora_config" not in metadata or "base" not in metadata:
        raise ValueError(
            f"{path} was not written by moelora's save_pretrained: its header holds no moelora_config."
        )
    try:
        written, print_ = json.loads(metadata["moelora_config"]), json.loads(metadata["base"])
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path} is damaged: its header's moelora_config is no JSON ({error})."
        ) from error
    version = written.get("format_version", 0)
    if version > FORMAT_VERSION:
        raise ValueError(
            f"{path} has format version {version}; this moelora reads up to {FORMAT_VERSION}: "
            "upgrade moelora."
        )
    return tensors, MoeLoraConfig.from_dict(written), print_


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
        beside = _beside(source, saved)
        asked = {n: getattr(given, n) for n in own if getattr(given, n) != getattr(beside, n)}
        inherited = {f.name for f in fields(given)} | {"output_attentions"}
        for name in inherited - {*own, "transformers_version", "architectures"}:
            if getattr(given, name) != getattr(beside, name):
                kwargs.setdefault(name, getattr(given, name))
        if given._attn_implementation is not None:
            kwargs.setdefault("attn_implementation", given._attn_implementation)
    if "router_options" in asked:
        asked["router_options"] = changed_options(
            saved.router, saved.router_options, asked["router_options"]
        )
    fixed = sorted(
        name for name in asked if name not in CHANGEABLE and asked[name] != getattr(saved, name)
    )
    if fixed:
        raise ValueError(
            f"{', '.join(fixed)} cannot be changed when loading {source.name}: the experts and routers in it "
            f"were trained with what it says. These can: {', '.join(CHANGEABLE)}."
        )
    return {name: value for name, value in asked.items() if name in CHANGEABLE}


def _beside(source: Source, saved: MoeLoraConfig) -> MoeLoraConfig:
    """The configuration in config.json; not `saved` where a save was cut off, or a person edited
    it.
    """
    path = source.file(CONFIG_NAME)
    try:
        return saved if path is None else MoeLoraConfig.from_json_file(path)
    except (ValueError, TypeError, OSError):
        return saved


def _load_base(
    cls: Any,
    source: Source,
    config: MoeLoraConfig,
    base: Any,
    kwargs: dict[str, Any],
    allow_mismatch: bool,
) -> PreTrainedModel:
    """The base: the given one, the one inside the checkpoint, or the one that it names."""
    if isinstance(base, PreTrainedModel):
        surplus = sorted(k for k, v in kwargs.items() if v is not None and k != "trust_remote_code")
        if surplus:
            raise ValueError(
                f"{surplus} go to from_pretrained, but the base is loaded already: drop them."
            )
        if not allow_mismatch:
            _check_architecture(base.config.model_type, type(base).__name__, source, config)
        return base
    if base is not None:
        where, found_by = str(base), {}
    elif config.base_folder is not None:
        where, found_by = source.base(config.base_folder)
    elif config.base_model_name_or_path:
        where = config.base_model_name_or_path
        found_by = {"revision": config.base_revision, "subfolder": config.base_subfolder}
    else:
        raise ValueError(
            f"{source.name} names no base: it was saved from a model that was made in memory. Pass base=… (a "
            "folder, an id or a loaded model), or save with save_base=True."
        )
    found_by = {**source.access, **{k: v for k, v in found_by.items() if v is not None}}
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
    config.base_revision, config.base_subfolder = (
        found_by.get("revision"),
        found_by.get("subfolder"),
    )
    return cls.auto_class.from_pretrained(where, **found_by, **kwargs)


def _check_architecture(model_type: str, where: str, source: Source, config: MoeLoraConfig) -> None:
    expected = (config.base_config or {}).get("model_type", model_type)
    if model_type != expected:
        raise ValueError(
            f"{where} is a {model_type!r} model; the experts in {source.name} belong to a {expected!r} "
            f"({config.base_architecture}). Pass base=… with the right one."
        )


def _check(model: Any, tensors: Mapping[str, Tensor], path: Path) -> None:
    """Raise ValueError unless every tensor has its shape and finite values; nothing is loaded
    before.
    """
    own = torch.nn.Module.state_dict(model)
    wrong = []
    for key in trained_keys(model):
        if key not in tensors:
            wrong.append(f"{key} is missing")
        elif tensors[key].shape != own[key].shape:
            wrong.append(f"{key} is {list(tensors[key].shape)}, expected {list(own[key].shape)}")
    for key, tensor in tensors.items():
        if key not in own:
            wrong.append(f"{key} is unknown")
        elif tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            wrong.append(f"{key} contains NaN or Inf")
    if wrong:
        raise ValueError(
            f"{path} does not fit: " + "; ".join(wrong[:6]) + f" ({len(wrong)} in all)."
        )
