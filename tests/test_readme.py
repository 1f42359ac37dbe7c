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


def test_the_adapters_example_runs(tmp_path, monkeypatch):
    _, code = blocks()
    monkeypatch.chdir(tmp_path)
    causal_base().save_pretrained("base")
    for seed, name in enumerate(("math", "code")):
        fresh = AutoModelForCausalLM.from_pretrained("base")
        save_adapter(f"adapters/{name}", fresh, seed, r=4, target_modules=["q_proj", "up_proj"])
    exec(compile(code.replace("HuggingFaceTB/SmolLM2-135M", "base"), "README.md", "exec"), {})
    for folder in ("exported/math", "exported/merged"):
        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("base"), folder)


def test_the_example_runs(tmp_path, monkeypatch, capsys):
    code, _ = blocks()
    vocabulary = {
        "[UNK]": 0,
        **{letter: i + 1 for i, letter in enumerate("abcdefghijklmnopqrstuvwxyz(),:+ ")},
    }
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    base = tmp_path / "base"
    causal_base().save_pretrained(base)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]").save_pretrained(base)

    monkeypatch.chdir(tmp_path)
    named = "HuggingFaceTB/SmolLM2-135M"
    assert named in code and len(code.splitlines()) <= 20
    exec(compile(code.replace(named, str(base)), "README.md", "exec"), {})
    assert "RoutingReport(8 routers" in capsys.readouterr().out
