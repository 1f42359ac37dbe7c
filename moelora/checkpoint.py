"""Saving and loading: safetensors only, atomic, with a reference to the base or the base itself.

`model.safetensors` holds the trained tensors and, in its header, the configuration and the base's fingerprint:
replacing that one file is what makes a save happen. `config.json` repeats the configuration for people and for
the Auto classes. The base, with `save_base`, lies in a folder named by its fingerprint.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_NAME, cached_file

from .config import FORMAT_VERSION, MoeLoraConfig
from .fingerprint import differences, digest, fingerprint

if TYPE_CHECKING:
    from .modeling import MoeLoraModel

PREFIX = "moelora."
BASE_FOLDER_PREFIX = "base-"


def trained_keys(model: Any) -> list[str]:
    """The state dict's keys that a checkpoint holds: the mixture's, and those of the base's trainable modules."""
    trainable = {n for n, p in model.named_parameters() if p.requires_grad and not n.startswith(PREFIX)}
    return [k for k in torch.nn.Module.state_dict(model) if k.startswith(PREFIX) or k in trainable]


def save(
    model: Any, folder: str | Path, state_dict: Mapping[str, Tensor] | None, save_base: bool, **kwargs
) -> None:
    """Write `model` into `folder`; see `MoeLoraModel.save_pretrained`."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    keys = trained_keys(model)
    state_dict = torch.nn.Module.state_dict(model) if state_dict is None else state_dict
    tensors = {k: state_dict[k].detach().cpu().contiguous() for k in keys}
    print_ = fingerprint(model, keys)
    config = describe(model)
    if save_base:
        config.base_folder = BASE_FOLDER_PREFIX + digest(print_)
        _save_base(model, folder / config.base_folder, **kwargs)
    metadata = {
        "format": "pt",
        "moelora_config": config.to_json_string(use_diff=False),
        "base": json.dumps(print_),
    }
    with _replacing(folder / SAFE_WEIGHTS_NAME) as temporary:
        safetensors.torch.save_file(tensors, temporary, metadata=metadata)
    # From here on the new checkpoint is the one that loads; the rest is for people, and tidying up.
    with _replacing(folder / "config.json") as temporary:
        temporary.write_text(config.to_json_string(use_diff=False), encoding="utf-8")
    if model.can_generate():
        model.generation_config.save_pretrained(folder)
    for stale in folder.glob(BASE_FOLDER_PREFIX + "*"):
        if stale.name != config.base_folder:
            shutil.rmtree(stale)


def describe(model: Any) -> MoeLoraConfig:
    """A copy of the mixture's configuration that also says which base it belongs to."""
    config = MoeLoraConfig.from_dict(model.moelora_config.to_dict())
    base = model.config.to_diff_dict()
    for ours in ("keys_to_ignore_at_inference", "quantization_config"):
        base.pop(ours, None)
    config.base_config = base
    config.base_architecture = model._get_name()
    config.base_model_name_or_path = model.config._name_or_path or None
    config.base_folder = None
    return config


def load(cls: type[MoeLoraModel], folder: str | Path, config: MoeLoraConfig | None, **kwargs) -> Any:
    """Load a checkpoint folder or hub repository; see `MoeLoraModel.from_pretrained`."""
    base = kwargs.pop("base", None)
    allow_mismatch = kwargs.pop("allow_base_mismatch", False)
    for name in ("_from_auto", "adapter_kwargs", "output_loading_info"):
        kwargs.pop(name, None)
    hub = {
        k: kwargs[k]
        for k in ("cache_dir", "force_download", "local_files_only", "revision", "token")
        if k in kwargs
    }
    path = _weights_file(folder, **hub)
    tensors, saved, print_ = read(path)
    # The header's configuration belongs to these weights; the file beside it may be of another moment.
    config = _overridden(saved, config)
    model = _load_base(cls, folder, config, base, print_, kwargs)
    restored = cls.from_base(model, config)
    found = differences(print_, restored, [k for k in tensors if not k.startswith(PREFIX)])
    if found and not allow_mismatch:
        raise ValueError(
            f"The base ({model.config._name_or_path or type(model).__name__}) is not the one that {folder} was "
            f"trained on ({config.base_model_name_or_path}): "
            + "; ".join(found)
            + ". Pass base=… with the right "
            "one, or allow_base_mismatch=True to load the experts onto this one all the same."
        )
    _check(restored, tensors, path)
    restored.load_state_dict(tensors)
    return restored.eval()


def read(path: Path) -> tuple[dict[str, Tensor], MoeLoraConfig, dict[str, Any]]:
    """The tensors, configuration and base fingerprint of a checkpoint's `model.safetensors`.

    Raises:
        ValueError: the file is damaged, no checkpoint of this package, or of a newer format.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {k: file.get_tensor(k) for k in file.keys()}
    except SafetensorError as error:
        raise ValueError(
            f"{path} is damaged or cut short ({error}): copy it again, or use an older checkpoint."
        ) from error
    if "moelora_config" not in metadata:
        raise ValueError(
            f"{path} was not written by moelora's save_pretrained: its header holds no moelora_config."
        )
    fields = json.loads(metadata["moelora_config"])
    version = fields.get("format_version", 0)
    if version > FORMAT_VERSION:
        raise ValueError(
            f"{path} has format version {version}; this moelora reads up to {FORMAT_VERSION}: upgrade moelora."
        )
    return tensors, MoeLoraConfig.from_dict(fields), json.loads(metadata["base"])


def _weights_file(folder: str | Path, **hub) -> Path:
    if Path(folder).is_dir():
        path = Path(folder) / SAFE_WEIGHTS_NAME
        if not path.is_file():
            raise ValueError(
                f"{folder} holds no {SAFE_WEIGHTS_NAME}: it is no moelora checkpoint, or not a whole one."
            )
        return path
    return Path(cached_file(str(folder), SAFE_WEIGHTS_NAME, **hub))  # type: ignore[arg-type]


def _overridden(saved: MoeLoraConfig, given: MoeLoraConfig | None) -> MoeLoraConfig:
    """The saved configuration, with what a caller's keywords changed in the one read from config.json."""
    if given is None:
        return saved
    shape = ("num_experts", "r", "sites", "router_scope", "expert_names")
    changed = [n for n in shape if getattr(given, n) != getattr(saved, n)]
    if not changed:
        for name in (
            "num_experts_per_tok",
            "norm_topk_prob",
            "lora_alpha",
            "lora_dropout",
            "router_jitter_noise",
        ):
            setattr(saved, name, getattr(given, name))
    saved._attn_implementation = given._attn_implementation
    saved.dtype = given.dtype
    saved.validate()
    return saved


def _load_base(
    cls: Any, folder: str | Path, config: MoeLoraConfig, base: Any, print_: dict, kwargs: dict
) -> PreTrainedModel:
    """The base: the given one, the one inside the checkpoint, or the one that it names."""
    if isinstance(base, PreTrainedModel):
        return base
    # AutoConfig keeps these two for itself when it reads config.json.
    if config._attn_implementation is not None:
        kwargs.setdefault("attn_implementation", config._attn_implementation)
    if config.dtype is not None:
        kwargs.setdefault("dtype", config.dtype)
    where = base
    if where is None and config.base_folder is not None:
        where = str(Path(folder) / config.base_folder) if Path(folder).is_dir() else str(folder)
        if not Path(folder).is_dir():
            kwargs["subfolder"] = config.base_folder
    if where is None:
        where = config.base_model_name_or_path
        kwargs["revision"] = config.base_revision
    if not where:
        raise ValueError(
            f"{folder} names no base: it was saved from a model that was made in memory. Pass base=… (a folder, "
            "an id or a loaded model), or save with save_base=True."
        )
    architecture = AutoConfig.from_pretrained(
        where, **{k: v for k, v in kwargs.items() if k in ("revision", "subfolder")}
    )
    if config.base_config and architecture.model_type != config.base_config.get("model_type"):
        raise ValueError(
            f"{where} is a {architecture.model_type!r} model; the experts in {folder} belong to a "
            f"{config.base_config.get('model_type')!r} ({config.base_architecture}). Pass base=… with the right one."
        )
    return cls.auto_class.from_pretrained(where, **kwargs)


def _check(model: Any, tensors: Mapping[str, Tensor], path: Path) -> None:
    """Raise ValueError unless every tensor has its shape and finite values; nothing is loaded before."""
    own = torch.nn.Module.state_dict(model)
    wrong = []
    for key in trained_keys(model):
        if key not in tensors:
            wrong.append(f"{key} is missing")
        elif tensors[key].shape != own[key].shape:
            wrong.append(f"{key} is {list(tensors[key].shape)}, expected {list(own[key].shape)}")
        elif tensors[key].is_floating_point() and not bool(tensors[key].isfinite().all()):
            wrong.append(f"{key} contains NaN or Inf")
    wrong += [f"{key} is unknown" for key in tensors if key not in own]
    if wrong:
        raise ValueError(f"{path} does not fit: " + "; ".join(wrong[:6]) + f" ({len(wrong)} in all).")


def _save_base(model: Any, folder: Path, **kwargs) -> None:
    """Write the base as transformers would, once: the folder's name is its content's."""
    if folder.is_dir():
        return
    temporary = Path(tempfile.mkdtemp(prefix=".base-", dir=folder.parent))
    try:
        with as_base(model) as base:
            base.save_pretrained(temporary, **kwargs)
        os.replace(temporary, folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


@contextmanager
def as_base(model: Any) -> Iterator[PreTrainedModel]:
    """`model` with its base's class and without the mixture's tensors, while inside; hooks stay."""
    cls, mixture = type(model), model._modules.pop("moelora")
    ignored = model.config.__dict__.pop("keys_to_ignore_at_inference", None)
    attached = model.__dict__.pop("_hf_peft_config_loaded", None)
    model.__class__ = cls.__bases__[1]
    try:
        yield model
    finally:
        model.__class__ = cls
        model._modules["moelora"] = mixture
        if ignored is not None:
            model.config.keys_to_ignore_at_inference = ignored
        if attached is not None:
            model._hf_peft_config_loaded = attached


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A temporary file beside `path` that takes its place once it is wholly written, and vanishes on an error."""
    handle, name = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        # mkstemp makes files that only their owner reads.
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
