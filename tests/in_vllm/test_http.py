"""The OpenAI client talks to a server in a process of its own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from in_vllm.served import NEW_TOKENS, generated, prompts, tiny_mixture, words_tokenizer
from launches import free_port
from openai import BadRequestError, OpenAI

SECONDS_TO_START = 900


@pytest.fixture
def server(tmp_path):
    """A mixture, and a client of the server that serves it."""
    mixture = tiny_mixture(tmp_path / "mixture")
    words_tokenizer().save_pretrained(tmp_path / "mixture")
    port = free_port()
    words = ["--model", "mixture", "--port", port, "--enforce-eager", "--dtype", "float32"]
    words += ["--max-model-len", 256, "--max-num-seqs", 4, "--no-enable-prefix-caching"]
    with (tmp_path / "log").open("w") as log:
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *map(str, words)]
        process = subprocess.Popen(command, cwd=tmp_path, stdout=log, stderr=log, env=environment())
    try:
        wait_for(f"http://127.0.0.1:{port}/health", process, tmp_path / "log")
        client = OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)
        yield mixture, client
    finally:
        process.terminate()
        process.wait(timeout=60)


def environment():
    """Processes of their own, as a server has them."""
    kept = {n: v for n, v in os.environ.items() if n not in ("PYTHONPATH", "VLLM_LOGGING_LEVEL")}
    return {**kept, "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}


def wait_for(address, process, log):
    end = time.monotonic() + SECONDS_TO_START
    while time.monotonic() < end:
        assert process.poll() is None, log.read_text()[-3000:]
        try:
            return urllib.request.urlopen(address, timeout=5)
        except OSError:
            time.sleep(1)
    raise TimeoutError(log.read_text()[-3000:])


def test_a_client_gets_the_mixture_single_experts_and_the_base(server):
    mixture, client = server
    rows = prompts()[3:6]

    def ask(**decided):
        extra = {"ignore_eos": True, "return_token_ids": True, "vllm_xargs": decided or None}
        answer = client.completions.create(
            model="mixture", prompt=rows, max_tokens=NEW_TOKENS, temperature=0, extra_body=extra
        )
        return [choice.token_ids for choice in sorted(answer.choices, key=lambda own: own.index)]

    def own(**keywords):
        return [answer.tokens for answer in generated(mixture, rows, **keywords)]

    expected = own()
    with mixture.use_experts("expert_2"):
        one = own()
    with mixture.use_experts({"expert_0": 0.0}):
        base = own()
    assert expected != one and expected != base and one != base
    assert ask() == expected
    assert ask(use_experts="expert_2") == one
    assert ask(expert_weights=[0, 0, 0, 0]) == base
    with pytest.raises(BadRequestError, match="The experts are|expert_0"):
        ask(use_experts="nobody")
    assert ask() == expected


def test_the_example_asks_in_three_ways(tmp_path):
    mixture = tiny_mixture(tmp_path / "mixture")
    tokenizer = words_tokenizer()
    tokenizer.save_pretrained(tmp_path / "mixture")
    row = prompts()[3]
    example = Path(__file__).parents[2] / "examples" / "serve_vllm.py"
    words = [sys.executable, example, "--model", "mixture", "--cpu", "--port", free_port()]
    words += ["--prompt", tokenizer.decode(row), "--max-tokens", 8, "--max-model-len", 64]
    run = subprocess.run(
        [*map(str, words)], cwd=tmp_path, env=environment(), text=True, capture_output=True
    )
    assert run.returncode == 0, run.stderr[-3000:]
    with mixture.use_experts("expert_0"):
        one = generated(mixture, [row])
    with mixture.use_experts({"expert_0": 0.0}):
        base = generated(mixture, [row])
    answers = {"the mixture": generated(mixture, [row]), "expert_0 alone": one, "the base": base}
    for name, (answer,) in answers.items():
        tokens = answer.tokens[:8]
        until = tokens.index(2) if 2 in tokens else len(tokens)
        said = tokenizer.decode(tokens[:until], skip_special_tokens=True)
        assert f"--- {name}\n{said}\n" in re.sub(r"\n +", "\n", run.stdout), name
