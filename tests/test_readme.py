"""The README's example runs as it stands, on a tiny base in place of the one that it names."""

from __future__ import annotations

import re
from pathlib import Path

from bases import causal_base
from peft import PeftModel
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from tests.adapters.peft_folders import save_adapter

README = Path(__file__).resolve().parents[1] / "README.md"


def blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)


def base_with_tokenizer(folder: Path) -> None:
    """A tiny base, saved with a tokenizer of single letters."""
    vocabulary = {
        "[UNK]": 0,
        **{letter: i + 1 for i, letter in enumerate("abcdefghijklmnopqrstuvwxyz(),:+ ")},
    }
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    causal_base().save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]").save_pretrained(folder)


def adapters_on(folder: Path) -> None:
    for seed, name in enumerate(("math", "code")):
        fresh = AutoModelForCausalLM.from_pretrained(folder)
        save_adapter(f"adapters/{name}", fresh, seed, r=4, target_modules=["q_proj", "up_proj"])


def run(code: str, base: str) -> None:
    named = "HuggingFaceTB/SmolLM2-135M"
    assert named in code and len(code.splitlines()) <= 20
    exec(compile(code.replace(named, base), "README.md", "exec"), {})


def test_the_adapters_example_runs(tmp_path, monkeypatch):
    _, code, *_ = blocks()
    monkeypatch.chdir(tmp_path)
    base_with_tokenizer(Path("base"))
    adapters_on(Path("base"))
    run(code, "base")
    for folder in ("exported/math", "exported/merged"):
        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("base"), folder)


def test_the_selector_example_runs(tmp_path, monkeypatch, capsys):
    _, _, code, *_ = blocks()
    monkeypatch.chdir(tmp_path)
    base_with_tokenizer(Path("base"))
    adapters_on(Path("base"))
    run(code, "base")
    assert "['math']" in capsys.readouterr().out


def test_the_example_runs(tmp_path, monkeypatch, capsys):
    code, *_ = blocks()
    monkeypatch.chdir(tmp_path)
    base_with_tokenizer(Path("base"))
    run(code, "base")
    assert "RoutingReport(8 routers" in capsys.readouterr().out


def test_the_outside_context_example_runs(tmp_path, monkeypatch, capsys):
    *_, code = blocks()
    monkeypatch.chdir(tmp_path)
    base_with_tokenizer(Path("base"))
    run(code, "base")
    assert "RoutingReport(1 routers" in capsys.readouterr().out
