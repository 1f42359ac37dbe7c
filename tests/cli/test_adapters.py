"""The console command end to end on real folders: check, compose, info, export, merge; and what it
refuses.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from moelora import MoeLoraConfig, MoeLoraForCausalLM
from moelora.checkpoint.reading import read, sealed
from moelora_cli import app
from tests.adapters.peft_folders import base_of, save_adapter

INPUT = torch.arange(2 * 6).view(2, 6) % 11 + 3


def run(*words: Any, status: int = 0) -> str:
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == status, result.output
    return result.output


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A base and two adapters of it, as their makers save them, and the mixture that `compose`
    makes.
    """
    root = tmp_path_factory.mktemp("cli")
    base = base_of("llama")
    base.save_pretrained(root / "base")
    for seed, name in enumerate(("math", "code")):
        fresh = AutoModelForCausalLM.from_pretrained(root / "base")
        save_adapter(
            root / name, fresh, seed, r=4 * (seed + 1), target_modules=["q_proj", "down_proj"]
        )
    found = {name: root / name for name in ("base", "math", "code", "mixture")}
    adapters = ("-a", f"math={found['math']}", "-a", f"code={found['code']}")
    text = run(
        "compose",
        found["base"],
        *adapters,
        "-o",
        found["mixture"],
        "--router-init",
        "arrow",
        "-k",
        1,
    )
    assert "2 experts" in text and "math, code" in text
    return found


def peft_logits(folders: dict[str, Path], adapter: Path) -> torch.Tensor:
    base = AutoModelForCausalLM.from_pretrained(folders["base"])
    with torch.no_grad():
        return PeftModel.from_pretrained(base, str(adapter)).eval()(INPUT).logits


def test_a_composed_mixture_loads_and_holds_the_adapters(folders: dict[str, Path]) -> None:
    model = MoeLoraForCausalLM.from_pretrained(folders["mixture"]).eval()
    config = model.moelora_config
    assert (config.expert_names, config.router, config.num_experts_per_tok) == (
        ["math", "code"],
        "arrow",
        1,
    )
    for name in ("math", "code"):
        with torch.no_grad(), model.use_experts(name):
            torch.testing.assert_close(
                model(INPUT).logits, peft_logits(folders, folders[name]), rtol=1e-5, atol=1e-5
            )


def test_check_lists_good_and_bad(folders: dict[str, Path], tmp_path: Path) -> None:
    good = ("-a", f"math={folders['math']}")
    assert "none" in run("check", folders["base"], *good)
    bad = save_adapter(
        tmp_path / "dora", AutoModelForCausalLM.from_pretrained(folders["base"]), use_dora=True
    )
    text = run(
        "check",
        folders["base"],
        *good,
        "-a",
        f"dora={bad}",
        "-a",
        f"lost={tmp_path / 'lost'}",
        status=1,
    )
    assert "none" in text and "DoRA" in text and "lost" in text


def test_info_needs_no_base(folders: dict[str, Path]) -> None:
    text = run("info", folders["mixture"])
    model = MoeLoraForCausalLM.from_pretrained(folders["mixture"])
    experts = sum(
        own.A.numel() + own.B.numel() for e in range(2) for own in model.moelora.expert(e).values()
    )
    counts = [
        int(cell) for cell in text.replace(",", "").replace("│", " ").split() if cell.isdigit()
    ]
    assert {"math", "code"} <= set(text.replace("│", " ").split())
    assert experts in {a + b for a in counts for b in counts}
    assert "arrow, top 1, token level, scope site" in text


def test_info_counts_the_parameters_on_a_quantised_base(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    """Of a quantised weight the fingerprint does not know the shape."""
    whole = run("info", folders["mixture"])
    path = folders["mixture"] / "model.safetensors"
    tensors, config, base = read(path)
    assert base["shapes"][f"{config.sites[0][0]}.weight"] is not None
    base["shapes"] |= {f"{linear}.weight": None for site in config.sites for linear in site}
    metadata = sealed(config.to_json_string(), json.dumps(base))
    save_file(tensors, tmp_path / path.name, metadata=metadata)
    text = run("info", tmp_path)
    assert text.splitlines()[1:] == whole.splitlines()[1:]


def test_info_tells_of_experts_that_are_not_there(folders: dict[str, Path], tmp_path: Path) -> None:
    path = folders["mixture"] / "model.safetensors"
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    tensors.pop(next(key for key in tensors if key.endswith(".lora_B.0.weight")))
    save_file(tensors, tmp_path / path.name, metadata=metadata)
    assert "error" in run("info", tmp_path, status=1)


def test_export_gives_the_adapter_back(folders: dict[str, Path], tmp_path: Path) -> None:
    run("export", folders["mixture"], "code", "-o", tmp_path / "again")
    torch.testing.assert_close(
        peft_logits(folders, tmp_path / "again"), peft_logits(folders, folders["code"])
    )
    text = run("export", folders["mixture"], "code", "-o", tmp_path / "again", status=1)
    assert "error" in text and "again" in text
    run("export", folders["mixture"], "code", "-o", tmp_path / "again", "--overwrite")


def test_merge_is_the_fixed_mixture(folders: dict[str, Path], tmp_path: Path) -> None:
    weights = ("-w", "math=0.7", "-w", "code=-0.25")
    text = run("merge", folders["mixture"], *weights, "-o", tmp_path / "merged")
    assert "0.7·math" in text
    model = MoeLoraForCausalLM.from_pretrained(folders["mixture"]).eval()
    with torch.no_grad(), model.use_experts({"math": 0.7, "code": -0.25}):
        wanted = model(INPUT).logits
    torch.testing.assert_close(
        peft_logits(folders, tmp_path / "merged"), wanted, rtol=1e-5, atol=1e-5
    )
    run("merge", folders["mixture"], *weights, "-o", tmp_path / "small", "--rank", 2)
    ties = ("--recipe", "dare_ties", "--density", 0.5, "--seed", 3, "--rank", 4)
    run("merge", folders["mixture"], *weights, "-o", tmp_path / "ties", *ties)
    assert peft_logits(folders, tmp_path / "ties").isfinite().all()


def test_mistakes_are_messages_and_no_tracebacks(folders: dict[str, Path], tmp_path: Path) -> None:
    cases = [
        (
            ("compose", folders["base"], "-a", "math", "-o", tmp_path / "x"),
            "'math' is not NAME=VALUE",
        ),
        (("export", folders["mixture"], "law", "-o", tmp_path / "x"), "There is no expert 'law'"),
        (
            ("merge", folders["mixture"], "-w", "math=much", "-o", tmp_path / "x"),
            "expected a number",
        ),
        (("info", tmp_path / "nothing"), "nothing"),
    ]
    for words, message in cases:
        text = run(*words, status=1)
        assert message in " ".join(text.split()) and "Traceback" not in text
    assert not (tmp_path / "x").exists()


def test_one_adapter_becomes_several_experts(folders: dict[str, Path], tmp_path: Path) -> None:
    one = ("compose", folders["base"], "-a", f"code={folders['code']}", "-o", tmp_path / "parts")
    for wrong in (("--split", "svd"), ("--experts", 4)):
        assert "pass one -a" in " ".join(run(*one, *wrong, status=1).split())
    text = run(*one, "--split", "svd", "--experts", 4)
    assert "4 experts" in text and "code_0, code_1, code_2, code_3" in text
    model = MoeLoraForCausalLM.from_pretrained(tmp_path / "parts").eval()
    with torch.no_grad(), model.use_experts({f"code_{e}": 0.25 for e in range(4)}):
        logits = model(INPUT).logits
    torch.testing.assert_close(logits, peft_logits(folders, folders["code"]), rtol=1e-4, atol=1e-5)


def test_info_counts_a_shared_A_once(folders: dict[str, Path], tmp_path: Path) -> None:
    config = MoeLoraConfig(num_experts=2, r=3, share_lora_A=True, target_modules=["q_proj"])
    MoeLoraForCausalLM.from_base(folders["base"], config).save_pretrained(tmp_path)
    text = run("info", tmp_path)
    # Two layers of a q_proj from 32 to 32.
    assert "shared by all experts: A, 192 parameters" in text
    assert text.replace("│", " ").split().count("192") == 3


ALPHAS = {
    "one": ({"lora_alpha": 12}, ["12", "12"]),
    "one an expert": ({"lora_alpha": [6, 9]}, ["6", "9"]),
    "a pattern": ({"lora_alpha": 12, "alpha_pattern": {"q_proj": 5}}, ["5 to 12", "5 to 12"]),
    "a pattern by expert": (
        {"lora_alpha": [6, 9], "alpha_pattern": {"q_proj": [2, 9]}, "rank_pattern": {"q_proj": 7}},
        ["2 to 6", "9"],
    ),
    "rslora": ({"lora_alpha": [6, 9], "use_rslora": True}, ["6", "9"]),
}


@pytest.mark.parametrize("fields,expected", ALPHAS.values(), ids=ALPHAS)
def test_info_shows_each_alpha_that_there_is(fields, expected, folders, tmp_path: Path) -> None:
    config = MoeLoraConfig(num_experts=2, r=3, target_modules=["q_proj", "up_proj"], **fields)
    MoeLoraForCausalLM.from_base(folders["base"], config).save_pretrained(tmp_path)
    rows = [line.split("│") for line in run("info", tmp_path).splitlines() if "expert_" in line]
    assert [row[3].strip() for row in rows] == expected


@pytest.mark.parametrize("command", ["compose", "check", "export", "merge", "info"])
def test_help_has_an_example(command: str) -> None:
    assert f"Example: moelora {command}" in run(command, "--help")
    assert command in run("--help")


def test_wrong_usage_is_status_2() -> None:
    run("compose", status=2)
