"""examples/distributed/train.py under every engine, as its first lines say: two processes train,
save and resume as one process with the same global batch.
"""

from __future__ import annotations

import ast
import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from bases import causal_base
from launches import free_port
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

from moelora import MoeLoraForCausalLM

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "examples" / "distributed"
TRAIN = EXAMPLE / "train.py"
TWO_PROCESSES = ["-m", "torch.distributed.run", "--nproc_per_node", "2"]
RUNNER = str(Path(__file__).with_name("one_of_two.py"))
ENGINES = {
    "ddp": [],
    "fsdp2": ["--fsdp", "full_shard", "--fsdp_config", str(EXAMPLE / "fsdp2.json")],
    "zero2": ["--deepspeed", str(EXAMPLE / "zero2.json")],
    "zero3": ["--deepspeed", str(EXAMPLE / "zero3.json")],
}
# The loss of a step is printed with four digits; the weights of all engines differ by rounding.
TOLERANCE = 2e-5
WORDS = [f"w{i}" for i in range(60)]
SETTINGS = {
    "num_experts": 4,
    "expert_rank": 4,
    "max_steps": 4,
    "save_steps": 2,
    "logging_steps": 1,
    "learning_rate": 1e-2,
    "gradient_accumulation_steps": 2,
    "max_grad_norm": 0,
    "report_to": "none",
    "disable_tqdm": "true",
    "seed": 1,
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    """A folder with a tiny base, its tokenizer and some rows."""
    folder = tmp_path_factory.mktemp("inputs")
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    numbers = {word: i for i, word in enumerate([*special.values(), *WORDS])}
    words = Tokenizer(WordLevel(numbers, unk_token="<unk>"))
    words.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(folder / "base")
    causal_base().save_pretrained(folder / "base")
    draw = random.Random(0)
    rows = [
        {
            "prompt": " ".join(draw.choices(WORDS, k=draw.randint(3, 8))),
            "completion": " ".join(draw.choices(WORDS, k=draw.randint(2, 6))),
        }
        for _ in range(64)
    ]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def launched(
    inputs: Path, output: Path, engine: str | None, *before: str, **changes
) -> subprocess.CompletedProcess[str]:
    """Run the example in one process, or in two of an engine, perhaps by a script `before` it."""
    settings = SETTINGS | changes | {"base": inputs / "base", "data": inputs / "rows.jsonl"}
    settings["output_dir"] = output
    settings["per_device_train_batch_size"] = 4 if engine is None else 2
    script = [*before, str(TRAIN)]
    if engine not in ("zero2", "zero3"):
        script.append("--use_cpu")
    launcher = []
    if engine is not None:
        launcher = [*TWO_PROCESSES, f"--master_port={free_port()}", RUNNER]
    options = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    command = [sys.executable, *launcher, *script, *ENGINES.get(engine or "", []), *options]
    # DeepSpeed asks for a GPU's compiler where it sees a GPU.
    own = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    own["PYTHONPATH"] = os.pathsep.join(str(ROOT / folder) for folder in ("", "kernels", "tests"))
    return subprocess.run(
        command, env=os.environ | own, capture_output=True, text=True, timeout=300, check=False
    )


def train(inputs: Path, output: Path, engine: str | None, **changes) -> list[float]:
    """The loss of each step of a run that succeeds."""
    run = launched(inputs, output, engine, **changes)
    assert run.returncode == 0, run.stdout + run.stderr
    lines = re.findall(r"\{'loss'.*?\}", run.stdout)
    return [float(ast.literal_eval(line)["loss"]) for line in lines]


@pytest.fixture(scope="module")
def alone(inputs, tmp_path_factory):
    """One process: its folder and losses."""
    output = tmp_path_factory.mktemp("alone")
    return output, train(inputs, output, None)


@pytest.mark.parametrize("engine", ENGINES)
def test_two_processes_are_one(engine, inputs, alone, tmp_path):
    losses = train(inputs, tmp_path, engine)
    assert losses == pytest.approx(alone[1], abs=2e-3) and len(losses) == SETTINGS["max_steps"]
    expected = load_file(alone[0] / "model.safetensors")
    saved = load_file(tmp_path / "model.safetensors")
    assert saved.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(saved[name], tensor, atol=TOLERANCE, rtol=1e-3, msg=name)
    # What the engine saved loads in one process, and goes on there and in two.
    model = MoeLoraForCausalLM.from_pretrained(tmp_path)
    assert model.moelora_config.num_experts == SETTINGS["num_experts"]
    half = tmp_path / "checkpoint-2"
    assert load_file(half / "model.safetensors").keys() == expected.keys()
    resumed = train(inputs, tmp_path / "resumed", engine, resume_from_checkpoint=half)
    assert resumed == pytest.approx(losses[2:], abs=2e-3) and len(resumed) == 2


DIES = """
import os, runpy, sys
from transformers import Trainer
step = Trainer.training_step
def dies(self, *args, **kwargs):
    if os.environ["RANK"] == "1" and self.state.global_step == 1:
        os._exit(3)
    return step(self, *args, **kwargs)
Trainer.training_step = dies
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_a_worker_that_dies_stops_the_others_with_a_message(inputs, tmp_path):
    (tmp_path / "dies.py").write_text(DIES)
    run = launched(inputs, tmp_path / "out", "ddp", str(tmp_path / "dies.py"))
    assert run.returncode != 0
    assert "ChildFailedError" in run.stderr and "exitcode  : 3" in run.stderr
    assert not (tmp_path / "out" / "model.safetensors").exists()
