"""Where an adapter's files lie: local folders and hub snapshots, and that none of them leads
elsewhere.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterable
from os import PathLike
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import validate_repo_id

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
MAX_CONFIG_BYTES = 2**22
MAX_DEPTH = 32


def find_folder(source: str | PathLike[str]) -> tuple[Path, Path]:
    """The folder of an adapter, downloaded if need be, and the folder that its files may lie in.

    Args:
        source: a folder, or a hub id (`id@revision` for a revision), of which *.json and
            *.safetensors are fetched.

    Raises:
        ValueError: there is no such folder, and no repository of that name that can be reached.
    """
    folder = Path(source)
    # Not Path's methods, which raise where a name is too long or holds a zero.
    if not os.path.isdir(folder):
        if os.path.exists(folder):
            raise ValueError(
                f"{source} is a file; expected the folder that holds {CONFIG} and {WEIGHTS}, or a "
                "hub id."
            )
        folder = _download(str(source))
    # The hub's cache keeps a snapshot's files in `blobs` beside `snapshots`, and links to them.
    for parent in folder.resolve().parents:
        if parent.name == "snapshots" and (parent.parent / "blobs").is_dir():
            return folder, parent.parent
    return folder, folder


def inside(path: Path, root: Path) -> Path:
    """`path` without links.

    Raises:
        ValueError: it leads out of `root`, or is not a regular file.
    """
    target = Path(os.path.realpath(path))
    root = root.resolve()
    if not target.is_relative_to(root):
        raise ValueError(
            f"{path} links to {target}, outside of {root}: copy the file itself into the folder."
        )
    if not target.exists() or not stat.S_ISREG(target.stat().st_mode):
        raise ValueError(f"{path} is not a regular file: copy the file itself into the folder.")
    return target


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a small file.

    Raises:
        ValueError: the file cannot be read or is too large, or what it holds is not a JSON object,
            or is nested deeper than any configuration.
    """
    try:
        size = path.stat().st_size
        if size > MAX_CONFIG_BYTES:
            raise ValueError(f"it has {size} bytes; expected at most {MAX_CONFIG_BYTES}")
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON ({error}): save the adapter again.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a JSON {type(content).__name__}; expected an object.")
    level: list[Any] = [content]
    for _ in range(MAX_DEPTH):
        level = [inner for value in level for inner in _inside_of(value)]
    if level:
        raise ValueError(
            f"{path} is JSON nested more than {MAX_DEPTH} deep: save the adapter again."
        )
    return content


def _inside_of(value: Any) -> Iterable[Any]:
    """What a JSON object or array holds; nothing for other values."""
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else ()


def xlora_sources(source: str | PathLike[str]) -> dict[str, str]:
    """The adapters of an X-LoRA checkpoint (arXiv:2402.07148) by name; its own router is not used.

    An adapter is where `adapters` in adapter_config.json says, else a subfolder of its name; a
    checkpoint from the hub is not followed to this machine's folders. (The subfolders that PEFT
    itself writes come second, since they are not whole.)

    Raises:
        ValueError: it is not an X-LoRA checkpoint, or an adapter is not where it should be.
    """
    folder, root = find_folder(source)
    if not (folder / CONFIG).exists():
        raise ValueError(
            f"{folder} holds no {CONFIG}: it is not an X-LoRA checkpoint, or not a whole one."
        )
    config = read_json(inside(folder / CONFIG, root))
    if str(config.get("peft_type")) != "XLORA":
        raise ValueError(
            f"{folder} holds a {config.get('peft_type')} adapter, not an X-LoRA checkpoint of "
            'several: pass a dict {"name": folder} of all adapters.'
        )
    named = config.get("adapters")
    if not isinstance(named, dict) or not named:
        raise ValueError(f"{folder}/{CONFIG} names no adapters: pass a dict of them.")
    local = os.path.isdir(source)
    return {name: _xlora_adapter(folder, root, name, where, local) for name, where in named.items()}


def _xlora_adapter(folder: Path, root: Path, name: str, where: Any, local: bool) -> str:
    if local and isinstance(where, str) and os.path.isdir(folder / where):
        return str(folder / where)
    plain = Path(name).name == name and name not in ("", ".", "..")
    if plain and os.path.exists(folder / name / CONFIG):
        if not (folder / name).resolve().is_relative_to(root.resolve()):
            raise ValueError(f"{folder / name} links out of {root}: copy the folder itself.")
        return str(folder / name)
    if local and isinstance(where, str) and where:
        return where
    raise ValueError(f"{folder} holds no folder for its adapter {name!r}: pass a dict of adapters.")


def _download(name: str) -> Path:
    repository, _, revision = name.partition("@")
    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise ValueError(
            f"There is no folder {name}, and it is not a hub id either ({error})."
        ) from error
    try:
        return Path(
            snapshot_download(
                repository, revision=revision or None, allow_patterns=["*.json", "*.safetensors"]
            )
        )
    except (OSError, HfHubHTTPError) as error:
        raise ValueError(
            f"There is no folder {name}, and the hub repository of that name is not in the cache "
            f"and cannot be reached ({type(error).__name__}: {str(error).splitlines()[0]}): give a "
            "folder, or download it first."
        ) from error
