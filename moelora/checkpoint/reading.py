"""Reading a checkpoint's `model.safetensors`, which may be damaged or made to do harm: all of it is
checked before anything is built from it.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..config import FORMAT_VERSION, MoeLoraConfig
from ..core.mixture import Mixture
from ..routers import ROUTERS
from ..validation import json_object
from .quantisation import HOW
from .state import check_fingerprint, is_finite

ATTEMPTS = 100
TEXTS = ("moelora_config", "base")
BASE_FOLDER = re.compile(r"base-[0-9a-f]{16}")

Contents = tuple[dict[str, Tensor], MoeLoraConfig, dict[str, Any]]


def sealed(config: str, base: str) -> dict[str, str]:
    """The metadata of a `model.safetensors`: the configuration and the base's fingerprint as JSON,
    and a hash that shows damage.
    """
    digest = hashlib.sha256(json.dumps([config, base]).encode()).hexdigest()
    return {"format": "pt", "moelora_config": config, "base": base, "digest": digest}


def read(path: Path) -> Contents:
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


def _read_once(path: Path) -> Contents:
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


def is_ours(folder: Path, name: str) -> bool | None:
    """Whether moelora wrote the `config.json` or `model.safetensors` called `name` in `folder`.

    None where that cannot be told: the file is not there, or is damaged.
    """
    path = folder / name
    with suppress(ValueError, OSError, SafetensorError, RecursionError):
        if path.suffix == ".json":
            return json_object(path).get("model_type") == MoeLoraConfig.model_type
        with safe_open(path, framework="pt") as file:
            return TEXTS[0] in (file.metadata() or {})
    return None


def _described(path: Path, metadata: Mapping[str, str]) -> tuple[MoeLoraConfig, dict[str, Any]]:
    """The configuration and the base's fingerprint that a header holds."""
    if not set(TEXTS) <= set(metadata):
        raise ValueError(
            f"{path} was not written by moelora: its header lacks {' and '.join(TEXTS)}."
        )
    texts = [metadata[name] for name in TEXTS]
    # Nothing but what was written: also of what is not read here, every bit counts.
    if dict(metadata) != sealed(*texts):
        raise ValueError(
            f"{path} is damaged: its header is not what was written. Copy it or save it again."
        )
    try:
        fields, base = map(json_object, texts)
        check_fingerprint(base)
        return _checked_config(path.name, fields), base
    except Exception as error:
        # Whatever a field holds and whoever stumbles over it.
        raise ValueError(f"{path} has a header that cannot be used: {error}") from error


def _checked_config(file: str, fields: dict[str, Any]) -> MoeLoraConfig:
    """The configuration with these fields; ValueError where they could not have been saved."""
    version = fields.get("format_version")
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise ValueError(
            f"{file} has format version {version}; this moelora reads up to {FORMAT_VERSION}: "
            "upgrade moelora."
        )
    known = {*MoeLoraConfig.field_names(), "model_type", "transformers_version"}
    surplus = sorted(set(fields) - known)
    names = fields.get("expert_names") or []
    linears = list(chain.from_iterable(fields.get("sites") or []))
    base: Any = fields.get("base_config")
    base = {"dtype": "float32"} if base is None else base
    dtype = base.get("dtype")
    folder = fields.get("base_folder")
    elsewhere = folder is not None and not BASE_FOLDER.fullmatch(folder)
    no_dtype = not isinstance(getattr(torch, str(dtype), None), torch.dtype)
    # Before anything is made for each of num_experts. What is of a wrong type altogether ends in an
    # error of another kind, here or below, which the caller takes as well.
    wrong = {
        f"it has fields {surplus[:4]}, which a MoeLoraConfig does not have": surplus,
        "it is not of model_type 'moelora'": fields.get("model_type") != MoeLoraConfig.model_type,
        "num_experts is not the number of expert_names": fields.get("num_experts") != len(names),
        "sites is empty": not linears,
        "a linear is in two sites": len(set(linears)) < len(linears),
        f"base_folder={folder!r} is not the name of a base's folder": elsewhere,
        f"base_config has a {HOW} that is no dict": not isinstance(base.get(HOW, {}), dict),
        "base_config has no model_type": not isinstance(base.get("model_type", ""), str),
        f"base_config has the dtype {dtype!r}, which torch lacks": no_dtype,
    }
    for what, is_wrong in wrong.items():
        if is_wrong:
            raise ValueError(what)
    return MoeLoraConfig.from_dict(fields)


def _check_sizes(path: Path, config: MoeLoraConfig, shapes: Mapping[str, Iterable[int]]) -> None:
    """Raise ValueError where the configuration asks for tensors of other sizes than the file holds.

    So no memory is asked for by a number that only a text says.
    """
    held = {next(iter(shape), 1) for key, shape in shapes.items() if Mixture.owns(key)}
    asked = set()
    for site in config.sites or []:
        own = [config.ranks_of(linear) for linear in site]
        rows_of_A = [ranks[0] if config.share_lora_A else sum(ranks) for ranks in own]
        asked |= {*map(sum, own), sum(rows_of_A)}
    # A router of someone's own may refuse to be made like this; its shapes are compared later.
    with suppress(Exception), torch.device("meta"):
        narrow, wide = (ROUTERS[config.router](config, d_in).state_dict() for d_in in (1, 2))
        rows = {key: next(iter(tensor.shape), 1) for key, tensor in narrow.items()}
        # Not those that are as long as what the router reads, which its linears say.
        asked |= {n for key, n in rows.items() if n == next(iter(wide[key].shape), 1)}
    widths = {width for sizes in (config.block_sizes or {}).values() for width in sizes}
    if unheld := widths - {width for shape in shapes.values() for width in [*shape][-1:]}:
        raise ValueError(
            f"{path} does not fit: its block_sizes are {sorted(unheld)[:6]} wide, and no tensor in "
            "the file is."
        )
    if asked - held:
        raise ValueError(
            f"{path} does not fit: its configuration asks for tensors of {sorted(asked - held)[:6]}"
            " rows, and the file does not hold them."
        )
