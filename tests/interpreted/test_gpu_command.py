"""`make gpu` where there is no GPU: every step under the interpreter, and what becomes of those
that are wrong, die, hang or are ended from outside.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from moelora_kernels import PATHS

from benchmarks.gpu import has_failed, on_purpose
from benchmarks.kernels.faults import DIES, RAISES, WRONG
from benchmarks.kernels.names import GRAPH, TRAINING_STEP, ours
from benchmarks.kernels.steps import FAULTS, LINEARS, STEPS, steps_for

ROOT = Path(__file__).resolve().parents[2]


def words(out: Path, *more: str) -> list[str]:
    return [sys.executable, "-m", "benchmarks.gpu", "--tiny", "--out", str(out), *more]


def rows_in(out: Path) -> list[dict[str, Any]]:
    path = out / "kernels_tiny.json"
    return json.loads(path.read_text("utf-8"))["rows"] if path.is_file() else []


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """One run of all steps; PYTHONPATH is not set, as on the device machine."""
    out = tmp_path_factory.mktemp("gpu")
    clean = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "TRITON_INTERPRET")}
    command = words(out, "--jobs", "2", "--commit", "abc", "--seconds", "1500")
    done = subprocess.run(command, cwd=ROOT, env=clean, capture_output=True, text=True, check=False)
    assert (out / "kernels_tiny.json").is_file(), done.stderr
    return out, done


def test_every_step_finds_something(tiny: tuple[Path, Any]) -> None:
    rows = rows_in(tiny[0])
    assert {row["step"] for row in rows} == {step.name for step in steps_for(True)}
    wrong = [row for row in rows if has_failed(row) and not on_purpose(row)]
    assert wrong == [] and tiny[1].returncode == 0


def test_every_path_and_way_is_measured(tiny: tuple[Path, Any]) -> None:
    rows = rows_in(tiny[0])
    checked = {row["path"] for row in rows if row.get("ok") and "path" in row}
    assert checked == {*PATHS, "decode"}
    timed = {(row["measure"], row.get("candidate")) for row in rows if "microseconds" in row}
    assert {("forward+backward", ours("triton", fp32=True)), ("decode", ours("triton"))} <= timed
    for what in ("layer", "model"):
        for measure in (TRAINING_STEP, GRAPH):
            assert (f"{what} {measure}", ours("triton")) in timed
    assert ("model generate, static cache", ours("triton")) in timed
    assert any("graph breaks" in row for row in rows)


def test_what_fails_on_purpose_is_a_row_that_says_why(tiny: tuple[Path, Any]) -> None:
    rows = rows_in(tiny[0])
    failed = {
        (row["step"], row.get("candidate") or row["case"]): row["failed"]
        for row in rows
        if "failed" in row and row.get("measure") in (None, "forward")
    }
    assert "y is off" in failed[LINEARS, WRONG]
    assert "out of resources" in failed[LINEARS, RAISES]
    assert any(r.get("candidate") == DIES and "SIGSEGV" in r.get("failed", "") for r in rows)
    assert "ValueError: on purpose" in failed[FAULTS.name, "raises"]
    assert "SIGSEGV" in failed[FAULTS.name, "dies"]
    assert "nothing came" in failed[FAULTS.name, "sleeper"]
    well = [row["case"] for row in rows if row["step"] == FAULTS.name and row.get("ok")]
    assert well == ["before the error", "is well"]


def test_what_comes_back_is_few_files(tiny: tuple[Path, Any]) -> None:
    out, done = tiny
    names = sorted(path.name for path in out.iterdir())
    assert names == ["kernels_tiny.json", "kernels_tiny.log", "tiles_interpreter.json"]
    result = json.loads((out / "kernels_tiny.json").read_text("utf-8"))
    assert result["machine"]["commit"] == "abc" and result["settings"]["steps"]
    assert any(line["met"] is not None for line in result["summary"])
    assert "targets" in done.stdout and "on purpose" in done.stdout


def test_what_was_found_is_there_when_the_run_is_ended(tmp_path: Path) -> None:
    command = words(tmp_path, "--only", FAULTS.name)
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    until = time.time() + 120
    while not any(row["case"] == "dies" for row in rows_in(tmp_path)) and time.time() < until:
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 1 and "targets" in printed
    assert {"before the error", "raises", "dies"} <= {row["case"] for row in rows_in(tmp_path)}


def test_no_step_begins_after_the_deadline(tmp_path: Path) -> None:
    command = words(tmp_path, "--seconds", "0", "--only", "smoke,memory")
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0
    said = {row["step"]: row["not run"] for row in rows_in(tmp_path)}
    assert set(said) == {"smoke", "memory"} and "no time" in said["smoke"]


def test_the_command_needs_a_gpu(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    command = [sys.executable, "-m", "benchmarks.gpu", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "There is no GPU here" in done.stderr
    assert not list(tmp_path.iterdir())


def test_what_is_measured_first_leaves_time_for_the_rest() -> None:
    names = [step.name for step in STEPS]
    assert names.index("smoke") < names.index("what decides the dispatch") < names.index(LINEARS)
    assert names[-1] == "tiles, timed"
    # What must not be lost fits, if every step needs all of its time.
    assert sum(step.limit for step in STEPS[: names.index("a model, compiled")]) <= 540 - 100
