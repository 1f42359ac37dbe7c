"""The example of adapters in and out end to end: two steps on two layers, everything printed and
checked.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LINES = (
    "base", "adapter python, r=4", "adapter licences, r=32", "own adapter (oracle)", "arrow",
    "uniform merge", "prototype", "prototype, then router on the loss",
    "random, then router on labels",
)  # fmt: skip


@pytest.fixture(scope="module")
def example(tmp_path_factory):
    folder = tmp_path_factory.mktemp("example")
    run = subprocess.run(
        [
            sys.executable,
            str(ROOT / "examples/from_peft_adapters.py"),
            "--quick",
            "--output",
            str(folder),
        ],
        cwd=folder,
        env=os.environ
        | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")]), "COLUMNS": "160"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout, folder


def test_every_line_of_the_table_has_its_losses(example):
    printed, _ = example
    rows = [line for line in printed.splitlines() if line.startswith("│")]
    for name in LINES:
        (row,) = [row for row in rows if row.split("│")[1].strip() == name]
        assert len(re.findall(r"\b\d+\.\d{4}\b", row)) == 5


def test_the_choices_of_every_mixture_are_told(example):
    printed, _ = example
    shares = [
        float(share) for share in re.findall(r"own expert has (\d+\.\d)% of the choices", printed)
    ]
    assert len(shares) == 4 and all(0 <= share <= 100 for share in shares)


def test_adapters_and_the_exported_expert_are_stock_peft_folders(example):
    printed, folder = example
    for name in ("adapters/python", "adapters/licences", "exported/python"):
        assert {"adapter_config.json", "adapter_model.safetensors"} <= {
            p.name for p in (folder / name).iterdir()
        }
    (error,) = re.findall(r"largest relative difference of logits (\S+)", printed)
    assert float(error) <= 1e-5
