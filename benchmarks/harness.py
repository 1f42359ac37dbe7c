"""What every benchmark shares: the machine's line, timings taken in turns, and results as JSON and
a table.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"
# What of a command line is not a setting of the measurement.
NOT_SHOWN = ("output", "peak_of", "case", "experts", "only")
PACKAGES = ("torch", "triton", "transformers", "peft")


@dataclass
class Timings:
    """Seconds of each candidate, taken in turns: the i-th of all candidates lie beside each other
    in time.
    """

    seconds: dict[str, list[float]] = field(default_factory=dict)

    def median(self, name: str) -> float:
        """The median seconds of a candidate."""
        return statistics.median(self.seconds[name])

    def ratio(self, name: str, reference: str) -> tuple[float, float, float]:
        """(median, minimum, maximum) over rounds of the seconds of `name` over those of
        `reference`.
        """
        ratios = [a / b for a, b in zip(self.seconds[name], self.seconds[reference], strict=True)]
        return statistics.median(ratios), min(ratios), max(ratios)

    def divided_by(self, count: int) -> Timings:
        """The same for one of `count` things that each call did."""
        return Timings(
            {name: [s / count for s in seconds] for name, seconds in self.seconds.items()}
        )


def in_turns(
    candidates: dict[str, Callable[[], object]],
    rounds: int,
    warmup: int = 1,
    clock: Callable[[], float] = time.perf_counter,
) -> Timings:
    """Call every candidate once a round, `rounds` times after `warmup` uncounted rounds."""
    timings = Timings({name: [] for name in candidates})
    for round_ in range(warmup + rounds):
        for name, call in candidates.items():
            start = clock()
            call()
            elapsed = clock() - start
            if round_ >= warmup:
                timings.seconds[name].append(elapsed)
    return timings


def machine() -> dict[str, Any]:
    """What the figures depend on: processors, threads, versions, commit; None is what cannot be
    known here.
    """
    commit = _git("rev-parse", "--short", "HEAD")
    return {
        "processor": _processor(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in PACKAGES},
        "commit": commit,
        "uncommitted_changes": bool(_git("status", "--porcelain", "--", "*.py"))
        if commit
        else None,
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
    }


def save(
    name: str,
    settings: dict[str, Any],
    rows: list[dict[str, Any]],
    folder: Path = RESULTS,
    **more: list[dict[str, Any]],
) -> Path:
    """Write `<folder>/<name>.json` with the machine, the settings, the rows and more lists; returns
    its path.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    content = {"benchmark": name, "machine": machine(), "settings": settings, "rows": rows, **more}
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return path


def cpu_parser(doc: str | None, rounds: int, **numbers: int) -> argparse.ArgumentParser:
    """The options of a benchmark on the CPU: base, layers, rounds, output, and `numbers` with their
    defaults.
    """
    parser = argparse.ArgumentParser(description=doc)
    parser.add_argument("--base", default="smollm2", help="smollm2 (the demo's base) or tiny")
    for name, default in {"layers": 6, **numbers, "rounds": rounds}.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default)
    parser.add_argument("--output", type=Path, default=RESULTS)
    return parser


def save_and_print(name: str, settings: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    """Write the JSON into the folder of --output, and print the table."""
    shown = {k: v for k, v in vars(settings).items() if k not in NOT_SHOWN}
    path = save(name, shown, rows, settings.output)
    print(table(rows), f"\n{path}")


def table(rows: list[dict[str, Any]]) -> str:
    """Rows as a Markdown table; columns in the order of the first row that has them."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(_cell(row.get(c)) for c in columns) + " |" for row in rows]
    return "\n".join(lines)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _git(*words: str) -> str | None:
    """What git says, or None without git or away from a repository."""
    try:
        result = subprocess.run(
            ["git", *words], cwd=RESULTS.parents[1], capture_output=True, text=True, check=False
        )
    except FileNotFoundError:
        return None
    return None if result.returncode else result.stdout.strip()
