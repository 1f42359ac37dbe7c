"""Replacing a folder as a whole: readers see the folder from before or the new one, never a part."""

from __future__ import annotations

import glob
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout


@contextmanager
def replaced_at_once(folder: Path) -> Iterator[Path]:
    """A new folder beside `folder` to write into, which takes its place at the end.

    After an error inside, `folder` is as it was. A writer holds the lock beside its new folder for
    as long as it lives, so the next writer can tell what a killed one left behind, and removes it.

    Args:
        folder: the folder to make or to replace; everything in it goes.

    Raises:
        OSError: the new folder cannot be written or put in place.
    """
    folder = Path(os.path.realpath(folder))
    folder.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(folder)
    new, old, lock = _beside(folder, uuid.uuid4().hex[:8])
    with FileLock(lock):
        try:
            # Not mkdtemp, whose folders only their owner may read.
            new.mkdir()
            yield new
            mode = new.stat().st_mode & 0o666
            for path in new.iterdir():
                os.chmod(path, mode)
                with open(path, "rb+") as file:
                    os.fsync(file.fileno())
            if folder.is_dir():
                os.rename(folder, old)
            os.rename(new, folder)
        finally:
            _tidy(folder, new, old, lock)


def _beside(folder: Path, key: str) -> tuple[Path, Path, Path]:
    """Where one writer of `folder` keeps the new folder, the old one, and its lock."""
    new = folder.with_name(f".{folder.name}-{key}")
    return new, Path(f"{new}-old"), Path(f"{new}.lock")


def _remove_leftovers(folder: Path) -> None:
    """Remove what writers of `folder` left that were killed: nobody holds their locks any more."""
    for path in folder.parent.glob(f".{glob.escape(folder.name)}-{'[0-9a-f]' * 8}.lock"):
        key = path.name.removesuffix(".lock").rpartition("-")[2]
        try:
            with FileLock(path, timeout=0):
                _tidy(folder, *_beside(folder, key))
        except Timeout:
            continue


def _tidy(folder: Path, new: Path, old: Path, lock: Path) -> None:
    """Remove a writer's traces; where it was stopped between two renames, its old folder returns."""
    if old.is_dir() and not folder.exists():
        os.rename(old, folder)
    for path in (new, old):
        shutil.rmtree(path, ignore_errors=True)
    lock.unlink(missing_ok=True)
