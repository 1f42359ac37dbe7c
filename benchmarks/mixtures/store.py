"""What was measured, one record a run in one JSON file: a killed benchmark loses the run it was in.

A run is known by its settings, which name everything that decides what comes out: a second start
finds what is there and does the rest. Two processes may write at once.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock

from benchmarks.harness import machine

Record = dict[str, Any]


def key_of(settings: Mapping[str, Any]) -> str:
    """A short hash of a run's settings."""
    text = json.dumps(settings, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


class Store:
    """The records of one file."""

    def __init__(self, path: Path):
        self.path = path

    def records(self) -> list[Record]:
        """All records, oldest first; none where there is no file."""
        if not self.path.is_file():
            return []
        return json.loads(self.path.read_text(encoding="utf-8"))["runs"]

    def get(self, settings: Mapping[str, Any]) -> Record | None:
        """The record of a run with these settings, if there is one."""
        key = key_of(settings)
        return next((r for r in self.records() if r["key"] == key), None)

    def put(self, settings: Mapping[str, Any], found: Mapping[str, Any]) -> Record:
        """Add a record, or replace the one with the same settings."""
        record = {"key": key_of(settings), "settings": dict(settings), **found}
        with self._locked():
            kept = [r for r in self.records() if r["key"] != record["key"]]
            content = {"benchmark": "mixtures", "machine": machine(), "runs": [*kept, record]}
            partial = self.path.with_suffix(".partial")
            partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
            os.replace(partial, self.path)
        return record

    def once(self, settings: Mapping[str, Any], run: Callable[[], Mapping[str, Any]]) -> Record:
        """The record with these settings, which `run` makes where there is none."""
        return self.get(settings) or self.put(settings, run())

    @contextmanager
    def _locked(self) -> Iterator[None]:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # A file of its own, since the records' is replaced, and away from what is kept.
        name = hashlib.sha256(str(self.path.resolve()).encode()).hexdigest()[:16]
        with FileLock(str(Path(tempfile.gettempdir()) / f"mixtures-{name}.lock")):
            yield
