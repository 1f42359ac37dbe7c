"""Where an adapter's files lie: local folders and hub snapshots, and that none of them leads
elsewhere.
"""

from __future__ import annotations

import json
import os
import stat
from os import PathLike
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError
from peft.utils.constants import CONFIG_NAME as CONFIG
from peft.utils.constants import SAFETENSORS_WEIGHTS_NAME as WEIGHTS

from ..validation import MAX_DEPTH, check_depth

MAX_CONFIG_BYTES = 2**22


def find_folder(source: str | PathLike[str]) -> tuple[Path, Path]:
    """The folder of an adapter, downloaded if need be, and the folder that its files may lie in."""
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
    """`path` without links; ValueError where it leads out of `root` or is not a regular file."""
    target = Path(os.path.realpath(path))
    if not target.is_relative_to(root.resolve()):
        raise ValueError(
            f"{path} links to {target}, outside of {root}: copy the file itself into the folder."
        )
    if not target.exists() or not stat.S_ISREG(target.stat().st_mode):
        raise ValueError(f"{path} is not a regular file: copy the file itself into the folder.")
    return target


def read_config(folder: Path, root: Path) -> dict[str, Any]:
    """The settings in a folder's adapter_config.json; ValueError where they cannot be read."""
    if not os.path.lexists(folder / CONFIG):
        raise ValueError(
            f"{folder} holds no {CONFIG}: it is not a PEFT adapter, or not a whole one."
        )
    path = inside(folder / CONFIG, root)
    try:
        size = path.stat().st_size
        if size > MAX_CONFIG_BYTES:
            raise ValueError(f"it has {size} bytes; expected at most {MAX_CONFIG_BYTES}")
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError(f"it is a {type(content).__name__}")
        check_depth("it", content)
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(
            f"{path} is not a JSON object, nested more than {MAX_DEPTH} deep, or too large "
            f"({error}): save the adapter again."
        ) from error
    return content


def xlora_sources(source: str | PathLike[str]) -> dict[str, str]:
    """The adapters of an X-LoRA checkpoint (arXiv:2402.07148) by name; its own router is not used.

    An adapter is where `adapters` in adapter_config.json says, else a subfolder of its name; a
    checkpoint from the hub is not followed to this machine's folders. (The subfolders that PEFT
    itself writes come second, since they are not whole.)
    """
    folder, root = find_folder(source)
    config = read_config(folder, root)
    named = config.get("adapters")
    if config.get("peft_type") != "XLORA" or not isinstance(named, dict) or not named:
        raise ValueError(
            f"{folder} is not an X-LoRA checkpoint of several adapters, but has peft_type "
            f'{config.get("peft_type")}: pass a dict {{"name": folder}} of all adapters.'
        )
    local = os.path.isdir(source)
    return {
        name: _xlora_adapter(folder, root, name, where if local else None)
        for name, where in named.items()
    }


def _xlora_adapter(folder: Path, root: Path, name: str, where: Any) -> str:
    where = where if isinstance(where, str) else ""
    if where and os.path.isdir(folder / where):
        return str(folder / where)
    own = folder / name
    if os.path.exists(own / CONFIG) and own.resolve().is_relative_to(root.resolve()):
        return str(own)
    if where:
        return where
    raise ValueError(f"{folder} holds no folder for its adapter {name!r}: pass a dict of adapters.")


def _download(name: str) -> Path:
    repository, _, revision = name.partition("@")
    wanted = ["*.json", "*.safetensors"]
    try:
        return Path(snapshot_download(repository, revision=revision or None, allow_patterns=wanted))
    except HFValidationError as error:
        raise ValueError(
            f"There is no folder {name}, and it is not a hub id either ({error})."
        ) from error
    except OSError as error:
        raise ValueError(
            f"There is no folder {name}, and the hub repository of that name is not in the cache "
            f"and cannot be reached ({type(error).__name__}: {str(error).splitlines()[0]}): give a "
            "folder, or download it first."
        ) from error
