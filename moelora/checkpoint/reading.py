"""Reading a checkpoint's `model.safetensors`, which may be damaged or made to do harm: all of it is
checked before anything is built from it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..config import FORMAT_VERSION, MoeLoraConfig
from ..core.mixture import Mixture
from ..routers import ROUTERS
from .fingerprint import check_fingerprint
from .origin import BASE_FOLDER
from .state import is_finite

# Largest seen in practice: the shapes of a base of ten thousand tensors, a megabyte.
MAX_JSON_BYTES = 2**24
ATTEMPTS = 100
TEXTS = ("moelora_config", "base")


def sealed(config: str, base: str) -> dict[str, str]:
    """The metadata of a `model.safetensors`: two JSON texts, and a hash that shows damage.

    Args:
        config: the mixture's configuration.
        base: the base's fingerprint.
    """
    return {"format": "pt", "moelora_config": config, "base": base, "digest": _hash(config, base)}


def read(path: Path) -> tuple[dict[str, Tensor], MoeLoraConfig, dict[str, Any]]:
    """The tensors, configuration and base fingerprint of a checkpoint's `model.safetensors`.

    Raises:
        ValueError: the file is damaged, was not written by this package, or is of a newer format.
    """
    for _ in range(ATTEMPTS):
        # safetensors opens a file twice, for its header and for its tensors: a save in between
        # would mix two checkpoints.
        before = _identity(path)
        try:
            contents = _read_once(path)
        except Exception:
            if _identity(path) == before:
                raise
        else:
            if _identity(path) == before:
                return contents
    raise ValueError(f"{path} is replaced faster than it can be read: load it when saving is over.")


def _identity(path: Path) -> tuple[int, ...]:
    """What differs between the file at `path` and one that takes its place."""
    now = path.stat()
    return now.st_ino, now.st_size, now.st_mtime_ns, now.st_ctime_ns


def _read_once(path: Path) -> tuple[dict[str, Tensor], MoeLoraConfig, dict[str, Any]]:
    try:
        with safe_open(path, framework="pt") as file:
            config, base = _described(path, file.metadata() or {})
            shapes = {key: file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118
            _check_sizes(path, config, shapes)
            tensors = {key: file.get_tensor(key) for key in shapes}
    except SafetensorError as error:
        raise ValueError(
            f"{path} is damaged or cut short ({error}): copy it again, or use an older checkpoint."
        ) from error
    for key, tensor in tensors.items():
        if not is_finite(tensor):
            raise ValueError(f"{path} does not fit: {key} contains NaN or Inf.")
    return tensors, config, base


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        ValueError: the file is too large, or does not hold a JSON object.
    """
    if path.stat().st_size > MAX_JSON_BYTES:
        raise ValueError(
            f"{path} is larger than {MAX_JSON_BYTES} bytes: it is not a configuration."
        )
    try:
        return _object(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from error


def is_ours(folder: Path, name: str) -> bool | None:
    """Whether moelora wrote the `config.json` or `model.safetensors` called `name` in `folder`.

    None where that cannot be told: the file is not there, or is damaged.
    """
    with suppress(ValueError, OSError, SafetensorError):
        if name.endswith(".json"):
            return read_json(folder / name).get("model_type") == MoeLoraConfig.model_type
        with safe_open(folder / name, framework="pt") as file:
            return TEXTS[0] in (file.metadata() or {})
    return None


def _described(path: Path, metadata: Mapping[str, str]) -> tuple[MoeLoraConfig, dict[str, Any]]:
    """The configuration and the base's fingerprint that a header holds."""
    texts = [metadata.get(name) for name in TEXTS]
    if None in texts:
        raise ValueError(
            f"{path} was not written by moelora's save_pretrained: its header does not hold "
            f"{' and '.join(TEXTS)}."
        )
    config, base = map(str, texts)
    # Nothing but what was written: also of what is not read here, every bit counts.
    if dict(metadata) != sealed(config, base):
        raise ValueError(
            f"{path} is damaged: its header is not the one that was written. Copy it again, or use "
            "an older checkpoint."
        )
    with _blaming(path):
        fields = _object(config)
        print_ = _object(base)
    version = fields.get("format_version")
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise ValueError(
            f"{path} has format version {version}; this moelora reads up to {FORMAT_VERSION}: "
            "upgrade moelora."
        )
    with _blaming(path):
        _check_fields(fields)
        check_fingerprint(print_)
        return MoeLoraConfig.from_dict(fields), print_


@contextmanager
def _blaming(path: Path) -> Iterator[None]:
    """Whatever a field holds and whoever stumbles over it: a ValueError that names the file."""
    try:
        yield
    except Exception as error:
        raise ValueError(f"{path} has a header that is not valid: {error}") from error


def _object(text: str) -> dict[str, Any]:
    """The object that a JSON text holds; ValueError for anything else."""
    try:
        value = json.loads(text) if len(text) <= MAX_JSON_BYTES else None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"it is not JSON ({error})") from error
    if not isinstance(value, dict):
        raise ValueError(f"it holds a JSON {type(value).__name__}; expected an object")
    return value


def _hash(*texts: str) -> str:
    return hashlib.sha256(json.dumps(texts).encode()).hexdigest()


def _check_fields(fields: Mapping[str, Any]) -> None:
    """Raise ValueError where what `MoeLoraConfig` is made from could not have been saved."""
    surplus = sorted(
        set(fields) - {*MoeLoraConfig.field_names(), "model_type", "transformers_version"}
    )
    if surplus:
        raise ValueError(f"it has fields {surplus[:4]}, which a MoeLoraConfig does not have")
    if fields.get("model_type") != MoeLoraConfig.model_type:
        raise ValueError(f"it is not of model_type {MoeLoraConfig.model_type!r}")
    names = fields.get("expert_names")
    # Before anything is made for each of num_experts.
    if not isinstance(names, list) or fields.get("num_experts") != len(names):
        raise ValueError("num_experts is not the number of expert_names")
    if not fields.get("sites"):
        raise ValueError("sites is empty")
    for name in ("architecture", "model_name_or_path", "revision", "folder", "subfolder"):
        if not isinstance(fields.get(f"base_{name}"), (str, type(None))):
            raise ValueError(f"base_{name} is not a string")
    if not BASE_FOLDER.fullmatch(fields.get("base_folder") or f"base-{0:016}"):
        raise ValueError(
            f"base_folder={fields['base_folder']!r} is not the name of a base's folder"
        )
    base = fields.get("base_config")
    base = {"dtype": "float32"} if base is None else base
    if not isinstance(base, dict) or not isinstance(base.get("model_type", ""), str):
        raise ValueError("base_config is not the configuration of a model")
    if not isinstance(getattr(torch, str(base.get("dtype")), None), torch.dtype):
        raise ValueError(f"base_config has the dtype {base.get('dtype')!r}, which torch lacks")


def _check_sizes(path: Path, config: MoeLoraConfig, shapes: Mapping[str, Iterable[int]]) -> None:
    """Raise ValueError where the configuration asks for tensors of other sizes than the file holds.

    So no memory is asked for by a number that only a text says.
    """
    held = {next(iter(shape), 1) for key, shape in shapes.items() if Mixture.owns(key)}
    sites = config.sites or []
    linears = list(chain.from_iterable(sites))
    if len(set(linears)) < len(linears):
        raise ValueError(f"{path} has a header that is not valid: a linear is in two sites.")
    ranks = {linear: sum(config.ranks_of(linear)) for linear in linears}
    asked = {*ranks.values(), *(sum(ranks[linear] for linear in site) for site in sites)}
    # A router of someone's own may refuse to be made like this; its shapes are compared later.
    with suppress(Exception), torch.device("meta"):
        router = ROUTERS[config.router](config, 1)
        asked |= {next(iter(tensor.shape), 1) for tensor in router.state_dict().values()}
    if asked - held:
        raise ValueError(
            f"{path} does not fit: its configuration asks for tensors of {sorted(asked - held)[:6]}"
            " rows, and the file does not hold them."
        )
