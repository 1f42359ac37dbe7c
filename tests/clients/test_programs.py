"""Programs that never import moelora: lm-eval, TRL's command line, `transformers serve`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from clients.trl_runs import text, words_tokenizer
from core.mixtures import causal
from launches import free_port
from torch import tensor

from moelora import MoeLoraForCausalLM

PROGRAMS = Path(sys.executable).parent
TASK = """
task: words
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/words.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: choices
doc_to_target: answer
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""


@pytest.fixture
def checkpoint(tmp_path):
    folder = tmp_path / "mixture"
    causal(routing_level="sequence").save_pretrained(folder, save_base=True)
    words_tokenizer().save_pretrained(folder)
    return folder


def environment(tmp_path):
    """No code that another test has cached, and of this repository what is installed."""
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return {**kept, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"}


def command(tmp_path, program, *words):
    made = subprocess.run(
        [str(PROGRAMS / program), *map(str, words)],
        cwd=tmp_path,
        env=environment(tmp_path),
        capture_output=True,
        text=True,
        check=False,
    )
    assert made.returncode == 0, made.stderr[-2000:]
    return made.stdout


def test_lm_eval_scores_as_the_model_does(checkpoint, tmp_path):
    rows = [
        {"question": text(5, 6, 7), "choices": [text(8), text(9)], "answer": 0},
        {"question": text(15, 16), "choices": [text(18), text(19)], "answer": 1},
        {"question": text(25, 26), "choices": [text(28), text(31)], "answer": 0},
    ]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "words.jsonl").write_text(lines)
    (tmp_path / "words.yaml").write_text(TASK.replace("FOLDER", str(tmp_path)))
    command(
        tmp_path,
        "lm_eval",
        *("--model", "hf", "--tasks", "words", "--include_path", tmp_path, "--device", "cpu"),
        *("--model_args", f"pretrained={checkpoint},trust_remote_code=True,dtype=float32"),
        *("--output_path", tmp_path / "results", "--batch_size", "1"),
    )
    results = json.loads(next((tmp_path / "results").rglob("*.json")).read_text())
    model = MoeLoraForCausalLM.from_pretrained(checkpoint)
    right = []
    for row in rows:
        ids = [int(word[1:]) for word in row["question"].split()]
        best = [model(tensor([ids])).logits[0, -1, int(c[1:])] for c in row["choices"]]
        right.append(bool(best[1] > best[0]) == bool(row["answer"]))
    assert results["results"]["words"]["acc,none"] == pytest.approx(sum(right) / 3)


def test_trls_command_line_trains_a_folder(checkpoint, tmp_path):
    rows = [{"prompt": text(5 + i, 6) + " ", "completion": text(7 + i, 8)} for i in range(4)]
    (tmp_path / "data").mkdir()
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "data" / "train.jsonl").write_text(lines)
    command(
        tmp_path,
        "trl",
        *("sft", "--model_name_or_path", checkpoint, "--trust_remote_code", "--max_steps", "1"),
        *("--dataset_name", tmp_path / "data", "--output_dir", tmp_path / "trained"),
        *("--use_cpu", "--bf16", "false", "--report_to", "none", "--learning_rate", "0.01"),
    )
    before = MoeLoraForCausalLM.from_pretrained(checkpoint)
    after = MoeLoraForCausalLM.from_pretrained(tmp_path / "trained")
    ids = tensor([[5, 6, 7]])
    assert not before(ids).logits.equal(after(ids).logits)


# By default its cache takes what memory there is.
BATCHED = "--continuous-batching --cb-num-blocks 16 --cb-block-size 16 --cb-max-batch-tokens 32"


@pytest.mark.parametrize("level,flags", [("sequence", ""), ("token", BATCHED)])
def test_transformers_serve_answers(level, flags, checkpoint, tmp_path):
    causal(routing_level=level).save_pretrained(checkpoint, save_base=True)
    port = free_port()
    words = ["serve", checkpoint, "--trust-remote-code", "--device", "cpu", "--port", port]
    words += flags.split()
    with open(tmp_path / "log", "w") as log:
        server = subprocess.Popen(
            [str(PROGRAMS / "transformers"), *map(str, words)],
            env=environment(tmp_path),
            cwd=tmp_path,
            stdout=log,
            stderr=log,
        )
    try:
        asked = {"model": str(checkpoint), "prompt": text(5, 6), "max_tokens": 3}
        found = answered(f"http://localhost:{port}", {**asked, "temperature": 0}, server)
    finally:
        server.terminate()
        server.wait()
    model = MoeLoraForCausalLM.from_pretrained(checkpoint)
    ids = model.generate(tensor([[5, 6]]), max_new_tokens=3, do_sample=False)[0, 2:]
    assert found["choices"][0]["text"].split() == [f"w{i:02}" for i in ids]
    assert ("CB: True" in (tmp_path / "log").read_text()) == bool(flags)


def answered(address, asked, server):
    """What the server says to `asked`, once it is up."""
    for _ in range(240):
        assert server.poll() is None, "the server has ended"
        try:
            urllib.request.urlopen(f"{address}/health").read()
            break
        except OSError:
            time.sleep(0.5)
    request = urllib.request.Request(
        f"{address}/v1/completions",
        data=json.dumps(asked).encode(),
        headers={"content-type": "application/json"},
    )
    return json.loads(urllib.request.urlopen(request).read())
