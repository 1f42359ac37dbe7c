"""What a step has found so far, as lines of JSON in a file: whatever ends it, nothing is lost."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Row = dict[str, Any]
# A unit is begun again without the candidate that ended the process, this often.
ATTEMPTS = 4


@dataclass
class Record:
    """What a part file says.

    rows: what was found. over: the units that are not to be begun (again). avoid: by unit the
    candidates that ended a process. current: the unit and the candidate under way, if any. last: a
    dying process's own words.
    """

    rows: list[Row] = field(default_factory=list)
    over: set[str] = field(default_factory=set)
    avoid: dict[str, set[str]] = field(default_factory=dict)
    current: tuple[str, str] | None = None
    last: str = ""


def write(path: Path, line: dict[str, Any]) -> None:
    """Add a line; the next reader has it, whatever becomes of this process."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def read(path: Path) -> Record:
    """The file's lines; the last one may be cut off."""
    record = Record()
    if not path.is_file():
        return record
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            continue
        _take(record, line)
    return record


def _take(record: Record, line: dict[str, Any]) -> None:
    """Add what one line says."""
    if "row" in line:
        record.rows.append(line["row"])
    elif "begin" in line:
        record.current = (line["begin"], "")
    elif "doing" in line and record.current:
        record.current = (record.current[0], line["doing"])
    elif "last" in line:
        record.last = line["last"]
    elif "end" in line:
        record.over.add(line["end"])
        record.current = None
    elif "died" in line:
        avoid = record.avoid.setdefault(line["died"], set())
        if not line["candidate"] or line["candidate"] in avoid or len(avoid) >= ATTEMPTS:
            record.over.add(line["died"])
        avoid.add(line["candidate"])
        record.current = None
        record.last = ""
