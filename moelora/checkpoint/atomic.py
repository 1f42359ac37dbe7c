"""Files and folders that appear whole or not at all, also where several processes write to one
place.

Everything is written into a hidden staging folder first, so that a full disk or a kill changes
nothing that was there. One writer at a time holds a lock; a lock dies with its process, so a
staging folder that the holder of the lock finds belongs to a writer that was killed, and goes.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from os import PathLike
from pathlib import Path

from filelock import FileLock
from safetensors import SafetensorError


def atomic_files(folder: Path, commit: str) -> AbstractContextManager[Path]:
    """A staging folder inside `folder`; at the end what lies in it takes its place there.

    Subfolders go first, one that is there already stays; then the files, each replaced at once, and
    `commit` after all others. So whoever reads `commit` finds everything that it refers to. Other
    files in `folder` are left alone. An OSError says that `folder` holds what it held before.
    """

    def put(staging: Path) -> None:
        contents = sorted((p.is_file(), p.name == commit, p.name) for p in staging.iterdir())
        for is_file, _, name in contents:
            if is_file or not (folder / name).exists():
                os.replace(staging / name, folder / name)

    return _staged(folder / ".moelora", put, "checkpoint", folder)


@contextmanager
def atomic_folder(
    target: str | PathLike[str], replace: bool = False, what: str = "folder"
) -> Iterator[Path]:
    """A staging folder beside `target`, which takes that name at the end or is gone after an error.

    A link is followed. A folder that is there is replaced, or without `replace` a FileExistsError.
    """
    target = Path(os.path.realpath(target))
    hidden = target.with_name(f".moelora-{target.name}")
    replaced = Path(f"{hidden}.old")

    def restore() -> None:
        """Put the folder that was moved aside back, unless another has taken its place."""
        if replaced.is_dir() and not target.exists():
            os.rename(replaced, target)
        shutil.rmtree(replaced, ignore_errors=True)

    def put(staging: Path) -> None:
        if target.exists():
            if not replace:
                raise FileExistsError(f"{target} is there already: choose another folder.")
            os.rename(target, replaced)
        try:
            os.rename(staging, target)
        finally:
            restore()

    with _staged(hidden, put, what, target) as staging:
        restore()
        yield staging


@contextmanager
def _staged(hidden: Path, put: Callable[[Path], None], what: str, target: Path) -> Iterator[Path]:
    """A new folder, in the hands of one writer at a time, whose contents `put` brings to `target`;
    what goes wrong while writing is an OSError that names the target.
    """
    staging = Path(f"{hidden}.new")
    lock = Path(f"{hidden}.lock")
    try:
        hidden.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(lock):
            try:
                shutil.rmtree(staging, ignore_errors=True)
                # Not mkdtemp, whose folders only their owner may read.
                staging.mkdir()
                yield staging
                _finish_writing(staging)
                put(staging)
            finally:
                shutil.rmtree(staging, ignore_errors=True)
                # While it is held: who waits for it sees that it is gone, and makes a new one.
                # Windows keeps it.
                with suppress(PermissionError):
                    lock.unlink(missing_ok=True)
    except (OSError, SafetensorError) as error:
        number = getattr(error, "errno", None)
        if isinstance(error, FileExistsError) and number is None:
            raise
        message = f"The {what} in {target} could not be written: {error}"
        raise (OSError(message) if number is None else OSError(number, message)) from error


def _finish_writing(staging: Path) -> None:
    """Bring every file to the disk, readable by whom a new file is: safetensors' are not."""
    new_file = staging / ".new-file"
    new_file.touch()
    mode = new_file.stat().st_mode
    new_file.unlink()
    for path in staging.rglob("*"):
        if path.is_file():
            path.chmod(mode)
            with open(path, "rb+") as file:
                os.fsync(file.fileno())
