"""`make gpu` where there is no GPU: its steps under the interpreter, and what it says of a wrong
result.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import bench_kernels, gpu
from benchmarks.kernels import gpu_checks

CPU = torch.device("cpu")
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def no_bench(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The benchmark itself has its own tests; here it is only called."""
    called: list[Any] = []
    monkeypatch.setattr(bench_kernels, "main", called.append)
    return called


def test_every_check_is_made_and_saved(tmp_path: Path, no_bench: list[Any]) -> None:
    assert gpu.run(CPU, tmp_path, quick=True)
    assert no_bench == [["--device", "cpu", "--out", str(tmp_path), "--quick"]]
    rows = json.loads((tmp_path / "kernels_gpu_checks.json").read_text("utf-8"))["rows"]
    assert {row["path"] for row in rows} == {"dense", "grouped", "sequence", "fused", "decode"}
    assert all(row["ok"] and row["error"] <= 1e-5 for row in rows)


def test_a_wrong_result_is_named_and_the_rest_goes_on(
    tmp_path: Path,
    no_bench: list[Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    right = gpu_checks.ours

    def wrong(shape: Any, ids: Any, path: str) -> Any:
        def dies(**values: Any) -> Any:
            raise RuntimeError("out of resources")

        if path == "grouped":
            return dies
        if path == "dense":
            return lambda **values: 2 * right(shape, ids, path)(**values)
        return right(shape, ids, path)

    monkeypatch.setattr(gpu_checks, "ours", wrong)
    assert not gpu.run(CPU, tmp_path, quick=True)
    rows = json.loads((tmp_path / "kernels_gpu_checks.json").read_text("utf-8"))["rows"]
    assert not any(row["ok"] for row in rows if row["path"] in ("dense", "grouped"))
    assert all(row["ok"] for row in rows if row["path"] in ("sequence", "decode"))
    assert any("out of resources" in str(row["error"]) for row in rows)
    assert no_bench and "wrong" in capsys.readouterr().out


def test_the_command_needs_a_gpu(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    words = [sys.executable, "-m", "benchmarks.gpu", "--out", str(tmp_path)]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "There is no GPU here" in done.stderr
    assert not list(tmp_path.iterdir())
