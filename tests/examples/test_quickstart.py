"""The demo end to end, as its user starts it: two steps on two layers, everything printed."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
CANDIDATES = ("base, untrained", "same trainable", "same active", "mixture 8 x r=8, top-2")


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    # As a script, from another folder: the neighbours must be found all the same.
    run = subprocess.run(
        [sys.executable, str(ROOT / "examples/quickstart.py"), "--quick", "--output", str(folder)],
        cwd=folder,
        env=os.environ
        | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")]), "COLUMNS": "160"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout, folder


def test_every_candidate_and_domain_is_printed(demo):
    printed, _ = demo
    for word in (*CANDIDATES, "python", "cpp", "docs", "licences", "lowest mean"):
        assert word in printed
    # Four losses and their mean for each of the four candidates, in the table's rows alone.
    rows = [line for line in printed.splitlines() if line.startswith("│")]
    assert len(re.findall(r"\b\d+\.\d{4}\b", "\n".join(rows))) == 20


def test_heatmaps_and_checkpoint_are_written(demo):
    printed, folder = demo
    for name in ("routing.png", "routing_by_router.png"):
        assert (folder / name).read_bytes().startswith(b"\x89PNG")
    assert (folder / "checkpoint" / "model.safetensors").is_file()
    assert "logits equal bit for bit: True" in printed


def test_shares_of_a_domain_sum_to_one(demo):
    printed, _ = demo
    rows = [re.findall(r"(\d+\.\d)%", line) for line in printed.splitlines()]
    shares = [list(map(float, row)) for row in rows if len(row) == 8]
    assert len(shares) == 4
    # Eight numbers rounded to 0.1 are at most 0.4 off together.
    assert all(abs(sum(row) - 100) <= 0.41 for row in shares)


def test_specialisation_is_one_bit_where_each_expert_serves_two_domains():
    import reporting

    domain_to_expert = torch.tensor([0, 0, 1, 1])
    routing = torch.nn.functional.one_hot(domain_to_expert, 2).float()[:, None]
    assert reporting.mutual_information(routing).tolist() == [1.0]
    assert reporting.mutual_information(torch.full((4, 3, 8), 0.125)).abs().max() < 1e-6
