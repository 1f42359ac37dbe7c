"""The demo end to end, as its user starts it: two steps on two layers, everything printed."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from arriving import FORMS, load_tasks, measure
from smollm2 import load_smollm2

from moelora.training import PadRouting

ROOT = Path(__file__).resolve().parents[2]
CANDIDATES = (
    "base, untrained",
    "one LoRA, trained on and on",
    "mixture: an expert a task, and a gate",
    "LoRAs of the tasks, merged evenly",
    "one LoRA on all the data at once",
)


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
    return run, folder


def test_every_candidate_has_a_score_on_every_task(demo):
    rows = [line.split("│")[1:-1] for line in demo[0].stdout.splitlines() if line.startswith("│")]
    for name in CANDIDATES:
        (cells,) = [row[1:] for row in rows if row[0].strip() == name]
        assert len(cells) == len(FORMS) + 1
        assert all(re.fullmatch(r"\d+\.\d{3} \(\d+%\)", cell.strip()) for cell in cells)
    assert "lowest mean" in demo[0].stdout


def test_there_is_one_bar_and_no_wall_of_warnings(demo):
    assert demo[0].stdout.count("100%") >= 1 and "training and measuring" in demo[0].stdout
    assert "it/s]" not in demo[0].stderr and "Warning" not in demo[0].stderr


def test_picture_and_checkpoint_are_written(demo):
    run, folder = demo
    assert (folder / "forgetting.png").read_bytes().startswith(b"\x89PNG")
    assert (folder / "checkpoint" / "model.safetensors").is_file()
    assert "logits equal bit for bit: True" in run.stdout


def test_every_prompt_goes_to_one_expert(demo):
    rows = [re.findall(r"(\d+\.\d)%", line) for line in demo[0].stdout.splitlines()]
    shares = [list(map(float, row)) for row in rows if len(row) == len(FORMS)]
    assert len(shares) == len(FORMS) and all(abs(sum(row) - 100) <= 0.2 for row in shares)


def test_a_score_is_the_mean_over_texts_of_the_loss_that_the_model_gives():
    model, tokenizer = load_smollm2(num_layers=2)
    texts = load_tasks(tokenizer, train=1, test=10)[0].test.without("router_mask")
    seen = []
    score = measure(model, texts, PadRouting(pad_token_id=0), seen.append)
    assert seen == [8, 2]
    losses = []
    right = 0
    for row in texts.rows:
        ids = row["input_ids"][None]
        with torch.no_grad():
            given = model(ids, labels=row["labels"][None])
        losses.append(float(given.loss))
        answer = row["labels"][1:] != -100
        preferred = given.logits[0, :-1].argmax(-1)
        right += int((preferred == row["labels"][1:])[answer].all())
    assert score.loss == pytest.approx(sum(losses) / 10, rel=1e-4)
    assert score.right == right / 10


def test_no_test_prompt_is_learned_from():
    _, tokenizer = load_smollm2(num_layers=2)
    for task in load_tasks(tokenizer, train=96, test=32):
        learned = {tuple(prompt.tolist()) for prompt in task.train.prompts()}
        assert len(task.train) == 96 and len(task.test) == 32
        assert not learned & {tuple(prompt.tolist()) for prompt in task.test.prompts()}
