"""Where things lie: the files of a checkpoint, and the base that it refers to."""

from __future__ import annotations

import re
from os import PathLike
from pathlib import Path
from typing import Any

from transformers.utils import SAFE_WEIGHTS_NAME
from transformers.utils.hub import cached_file

from ..config import MoeLoraConfig
from ..injection.base import ACCESS

BASE_FOLDER = re.compile(r"base-[0-9a-f]{16}")


class Source:
    """Where a checkpoint lies: a local folder, or a repository on the hub.

    Args:
        name: the folder, or the id of the repository.
        kwargs: keywords of `from_pretrained`; those that say how to find it are taken out.

    Raises:
        TypeError: `name` is neither.
    """

    def __init__(self, name: str | PathLike[str], kwargs: dict[str, Any]):
        if not isinstance(name, (str, PathLike)):
            raise TypeError(
                f"pretrained_model_name_or_path={name!r} is a {type(name).__name__}; expected the "
                "folder that save_pretrained wrote, or the id of its repository."
            )
        self.name = str(name)
        self.access = {k: kwargs.pop(k) for k in ACCESS if k in kwargs}
        self.revision = kwargs.pop("revision", None)
        self.subfolder = kwargs.pop("subfolder", None) or ""
        self.folder = Path(name) / self.subfolder if Path(name).is_dir() else None

    def file(self, name: str) -> Path | None:
        """The path of a file of the checkpoint, downloaded if need be; None if it is not there."""
        if self.folder is not None:
            return self.folder / name if (self.folder / name).is_file() else None
        where = {"revision": self.revision, "subfolder": self.subfolder, **self.access}
        try:
            path = cached_file(self.name, name, **where)
        except OSError:
            if name == SAFE_WEIGHTS_NAME:
                raise
            return None
        return None if path is None else Path(path)

    def base(self, folder: str) -> tuple[str, dict[str, Any]]:
        """Where the base inside the checkpoint lies, and the keywords that find it."""
        if self.folder is not None:
            return str(self.folder / folder), {}
        inside = f"{self.subfolder}/{folder}" if self.subfolder else folder
        return self.name, {"subfolder": inside, "revision": self.revision}


def base_inside(config: MoeLoraConfig, folder: Path) -> str | None:
    """The name of the folder in `folder` that the base of `config` came from, or None."""
    name = config.base_model_name_or_path
    if not name:
        return None
    origin = Path(name, config.base_subfolder or "").resolve()
    inside = origin.parent == folder.resolve() and BASE_FOLDER.fullmatch(origin.name)
    return origin.name if inside and origin.is_dir() else None
