"""Where an adapter's files lie: local folders and hub snapshots, and that none of them leads
elsewhere.
"""

from __future__ import annotations

import os
import stat
from os import PathLike
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError
from peft.utils.constants import CONFIG_NAME as CONFIG
from peft.utils.constants import SAFETENSORS_WEIGHTS_NAME as WEIGHTS

from ..validation import MAX_DEPTH, check_depth, json_object

MAX_LENGTH = 2**22


def find_folder(source: str | PathLike[str]) -> tuple[Path, Path]:
    """The folder of an adapter, downloaded if need be, and the folder that its files may lie in."""
    folder = Path(source)
    # Not Path's methods, which raise where a name is too long or holds a zero.
    if not os.path.isdir(folder):
        if os.path.exists(folder):
            raise ValueError(
                f"{source} is a file; expected a folder with {CONFIG} and {WEIGHTS}, or a hub id."
            )
        repository, _, revision = str(source).partition("@")
        wanted = ["*.json", "*.safetensors"]
        try:
            folder = Path(
                snapshot_download(repository, revision=revision or None, allow_patterns=wanted)
            )
        except (HFValidationError, OSError) as error:
            why = "the hub repository of that name is not in the cache and cannot be reached"
            if isinstance(error, HFValidationError):
                why = "it is not a hub id either"
            raise ValueError(
                f"There is no folder {source}, and {why} ({type(error).__name__}: "
                f"{str(error).splitlines()[0]}): give a folder, or download it first."
            ) from error
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
        content = json_object(path, MAX_LENGTH)
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
    sources = {}
    for name, where in named.items():
        where = where if isinstance(where, str) and os.path.isdir(source) else ""
        own = folder / name
        if where and os.path.isdir(folder / where):
            sources[name] = str(folder / where)
        elif os.path.exists(own / CONFIG) and own.resolve().is_relative_to(root.resolve()):
            sources[name] = str(own)
        elif where:
            sources[name] = where
        else:
            raise ValueError(
                f"{folder} holds no folder for its adapter {name!r}: pass a dict of adapters."
            )
    return sources
