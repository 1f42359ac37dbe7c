"""Whatever is wrong on the command line ends in a message and a status, never in a traceback."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

import moelora
from moelora_cli import app
from tests.adapters.peft_folders import base_of, save_adapter

ROOT = Path(__file__).resolve().parents[2]
# Markup of rich, an emoji, a byte that is not UTF-8, and a name longer than any file's.
ODD_NAMES = ["[/x]", "[bold]:", ":smile:", "\udcff", "x" * 5000]


def run(*words: Any, status: int = 1, text: str | bytes = "") -> str:
    """What the command says, on one line."""
    result = CliRunner().invoke(app, [str(word) for word in words], input=text)
    assert isinstance(result.exception, SystemExit | None), repr(result.exception)
    assert result.exit_code == status, result.output
    assert "Traceback" not in result.output and "MarkupError" not in result.output
    return " ".join(result.output.split())


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, an adapter and a mixture, and next to them what is none of these."""
    root = tmp_path_factory.mktemp("mistakes")
    base_of("llama").save_pretrained(root / "base")
    save_adapter(root / "math", base_of("llama"), target_modules=["q_proj"])
    run("compose", root / "base", "-a", f"math={root / 'math'}", "-o", root / "mix", status=0)
    (root / "file").write_text("text")
    (root / "folder").mkdir()
    for name, content in {"json": b"{not", "deep": b"[" * 99_999, "bytes": b"\xff\xfe"}.items():
        (root / name).mkdir()
        (root / name / "config.json").write_bytes(content)
        (root / name / "adapter_config.json").write_bytes(content)
        (root / name / "model.safetensors").write_bytes(content)
    (root / "directories" / "model.safetensors").mkdir(parents=True)
    (root / "directories" / "adapter_config.json").mkdir()
    (root / "foreign").mkdir()
    save_file({"a": torch.zeros(1)}, root / "foreign" / "model.safetensors")
    return root


NOT_THERE = ["nowhere", "file", "folder", "json", "deep", "bytes", "directories", "foreign"]


@pytest.mark.parametrize("name", NOT_THERE + ODD_NAMES, ids=lambda name: repr(name)[:12])
def test_paths_that_lead_nowhere(root: Path, name: str) -> None:
    good = f"math={root / 'math'}"
    path = root / name
    run("check", path, "-a", good)
    run("check", root / "base", "-a", f"m={path}")
    run("compose", root / "base", "-a", f"m={path}", "-o", root / "out")
    run("info", path)
    run("export", path, "math", "-o", root / "out")
    run("merge", path, "-w", "math=1", "-o", root / "out")
    run("route", "-m", path, text='"w8"\n')
    run("route", "-m", root / "mix", "-i", path)
    run("merge", root / "mix", "-w", "math=1", "-o", root / "out", "--base", path)
    assert not (root / "out").exists()


@pytest.mark.parametrize("name", ODD_NAMES, ids=lambda name: repr(name)[:12])
def test_names_of_experts_and_choices_are_shown_as_they_are(root: Path, name: str) -> None:
    shown = name.encode(errors="backslashreplace").decode()[:50]
    assert shown in run("export", root / "mix", name, "-o", root / "out")
    run("merge", root / "mix", "-w", f"{name}=1", "-o", root / "out")
    run("merge", root / "mix", "-w", f"math={name}", "-o", root / "out")
    run("check", root / "base", "-a", f"{name}={root / 'math'}")
    run("compose", root / "base", "-a", f"{name}={root / 'math'}", "-o", root / "out")
    run("merge", root / "mix", "-w", "math=1", "-o", root / "out", "--recipe", name)
    for option in ("--router", "--router-init", "--routing-level", "--router-scope"):
        words = ("-a", f"math={root / 'math'}", "-o", root / "out", option, name)
        assert shown in run("compose", root / "base", *words)
    run(name, status=2)
    run("info", root / "mix", f"--{name}", status=2)


@pytest.mark.parametrize("name", ["[/x]", "a [bold] :smile: b"])
def test_folders_of_any_name_are_written_and_read(root: Path, tmp_path: Path, name: str) -> None:
    # A slash makes two folders of it, which is fine too.
    mixture = tmp_path / name
    good = f"math={root / 'math'}"
    assert name in run("compose", root / "base", "-a", good, "-o", mixture, status=0)
    assert name in run("info", mixture, status=0)
    assert name in run("export", mixture, "math", "-o", tmp_path / "e" / name, status=0)
    assert name in run("merge", mixture, "-w", "math=1", "-o", tmp_path / "m" / name, status=0)
    run("check", root / "base", "-a", f"m={tmp_path / 'e' / name}", status=0)


@pytest.mark.parametrize("word", ["math", "math=", "=x", "=", ""])
def test_pairs_that_are_not_pairs(root: Path, word: str) -> None:
    out = ("-o", root / "out")
    for command in (
        ("check", root / "base", "-a", word),
        ("compose", root / "base", "-a", word, *out),
        ("merge", root / "mix", "-w", word, *out),
        ("compose", root / "base", "-a", "a=b", *out, "--router-option", word),
    ):
        assert f"{word!r} is not NAME=VALUE" in run(*command)


@pytest.mark.parametrize("k", [0, -1, 2, 10**30])
def test_numbers_of_experts_out_of_range(root: Path, k: int) -> None:
    words = ("-a", f"math={root / 'math'}", "-o", root / "out", "-k", k)
    assert f"num_experts_per_tok={k}" in run("compose", root / "base", *words)


OUT_OF_RANGE = [
    ("--rank", 0),
    ("--rank", -3),
    ("--rank", 10**30),
    ("--recipe", "ties"),
    ("--density", 0.5),
    ("--recipe", "ties", "--rank", 2, "--density", 5),
    ("--recipe", "ties", "--rank", 2, "--density", "nan"),
    ("--recipe", "dare_linear", "--rank", 2, "--density", 0.5, "--seed", -1),
    ("--recipe", "dare_linear", "--rank", 2, "--density", 0.5, "--seed", 10**30),
]


@pytest.mark.parametrize("words", OUT_OF_RANGE, ids=str)
def test_settings_of_a_merge_out_of_range(root: Path, words: tuple) -> None:
    run("merge", root / "mix", "-w", "math=1", "-o", root / "out", *words)
    assert not (root / "out").exists()


@pytest.mark.parametrize("weight", ["nan", "inf", "-inf", "1e400", "1e39", "much", "[/x]"])
def test_weights_out_of_range(root: Path, weight: str) -> None:
    run("merge", root / "mix", "-w", f"math={weight}", "-o", root / "out")
    assert not (root / "out").exists()


def test_places_that_cannot_be_written(root: Path) -> None:
    good = f"math={root / 'math'}"
    for place in (root / "file", root / "file" / "x", Path("/dev/null"), Path("/proc/x/y")):
        run("compose", root / "base", "-a", good, "-o", place)
        run("export", root / "mix", "math", "-o", place, "--overwrite")
        run("merge", root / "mix", "-w", "math=1", "-o", place, "--overwrite")
    assert "it is empty" in run("compose", root / "base", "-a", good, "-o", "", status=2)


def test_wrong_usage_is_status_2(root: Path) -> None:
    for words in (
        (), ("bogus",), ("info",), ("route", "-m", root / "mix", "--batch-size", 0),
        ("route", "-m", root / "mix", "--top", 0),
        ("compose", root / "base", "-o", "x", "-k", "two"),
        ("merge", root / "mix", "-w", "a=1", "-o", "x", "--rank", "two"), ("info", "--bogus"),
    ):  # fmt: skip
        run(*words, status=2)


def test_the_version_and_where_an_error_happened(root: Path) -> None:
    assert run("--version", status=0) == f"moelora {moelora.__version__}"
    result = CliRunner().invoke(app, ["--traceback", "info", str(root / "nowhere")])
    assert isinstance(result.exception, ValueError)


def test_the_real_command_with_odd_bytes_and_closed_streams(root: Path) -> None:
    """Processes of their own: a name that is not UTF-8, and streams that are closed."""
    command = f"{sys.executable} -m moelora"
    cases = {
        f"PYTHONIOENCODING=ascii {command} info $'\\xff[/x]'": (1, "holds no model.safetensors"),
        f"{command} info {root / 'mix'} >&- 2>&-": (0, ""),
        f"{command} route -m {root / 'mix'} <&-": (1, "standard stream is closed"),
    }
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    running = {
        words: subprocess.Popen(
            ["bash", "-c", words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment
        )
        for words in cases
    }
    for words, (status, message) in cases.items():
        said = running[words].communicate(timeout=300)[0].decode()
        assert running[words].returncode == status, (words, said)
        assert message in said and "Traceback" not in said and "Exception" not in said, (
            words,
            said,
        )
