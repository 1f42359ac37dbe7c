"""One expert out as a stock PEFT LoRA folder: PEFT loads it to the forced expert's logits, with the
same bits.
"""

from __future__ import annotations

import copy
import json
import math
import os
import warnings
from pathlib import Path

import pytest
import torch
from adapters.peft_folders import base_of, mixed_adapters
from bases import causal_base
from core.mixtures import activate, causal, classifier, factors, into, tokens
from peft import PeftModel
from safetensors.torch import load_file

from moelora import MoeLoraConfig, MoeLoraForCausalLM
from moelora.adapters.merging import expert_deltas
from moelora.injection.inject import put_into

INPUT = tokens(3, 9)
FIRST, LAST = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"
# Rank 0 for one expert in one linear and for all in another, odd ranks, and scalings that are no
# round numbers.
MIXED = {
    "expert_ranks": {
        FIRST: [2, 0, 5, 3],
        LAST: [1, 7, 3, 3],
        "model.layers.1.self_attn.k_proj": [0, 0, 0, 0],
    },
    "expert_scaling": {FIRST: [0.5, 1.0, 3.0, 0.1], LAST: [-1.5, 0.7, 2.0, 1.9]},
}


def model_of(name: str, **fields):
    """An active mixture in the tiny base `name`, a classifier for BERT."""
    return classifier(name, **fields) if name == "bert" else causal(name, **fields)


def logits(model, **how):
    """Logits of `INPUT` in eval mode, without a gradient."""
    with torch.no_grad():
        return model.eval()(input_ids=INPUT, **how).logits


def forced(model, experts):
    """Logits with these experts alone."""
    with model.use_experts(experts):
        return logits(model)


def stock(name: str, folder: Path):
    """The stock `PeftModel` that an unchanged base and the folder make; PEFT may not warn of
    missing keys.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(missing|fan_in_fan_out).*")
        return PeftModel.from_pretrained(base_of(name), str(folder)).eval()


def close(found, expected):
    """Equal within 1e-5 of the largest value."""
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2", "opt", "bert"])
def test_peft_loads_an_expert_to_the_same_logits(name, tmp_path):
    model = model_of(name)
    model.export_expert("expert_2", tmp_path / "out")
    expected = forced(model, "expert_2")
    close(logits(stock(name, tmp_path / "out")), expected)
    assert (expected - logits(base_of(name))).abs().max() > 1e-3
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]


@pytest.mark.parametrize("expert", ["expert_0", "expert_1", "expert_2", "expert_3"])
@pytest.mark.parametrize("use_rslora", [False, True])
def test_ranks_and_scalings_of_single_linears_go_out_exactly(expert, use_rslora, tmp_path):
    model = causal("llama", **MIXED, use_rslora=use_rslora)
    model.export_expert(expert, tmp_path)
    made = stock("llama", tmp_path)
    close(logits(made), forced(model, expert))
    deltas = expert_deltas(model, expert)
    for linear, delta in deltas.items():
        layer = made.base_model.model.get_submodule(linear)
        assert layer.scaling["default"] == delta.scaling, linear
        # Whatever had to be added to the rank adds nothing.
        assert torch.equal(layer.lora_A["default"].weight[: len(delta.A)], delta.A)
        assert not layer.lora_A["default"].weight[len(delta.A) :].any()
    adapted = {
        n.removeprefix("base_model.model.") for n, m in made.named_modules() if hasattr(m, "lora_A")
    }
    assert adapted == set(deltas)


def without_alpha(rank: int) -> float:
    """A scaling that no double divided by `rank` gives: where doubles near s·rank lie wider than
    rank·ulp(s).
    """
    for step in range(100):
        scaling = 1.5 + step * math.ulp(1.5)
        alpha = scaling * rank
        near = (alpha, math.nextafter(alpha, 0), math.nextafter(alpha, 9))
        if all(a / rank != scaling for a in near):
            return scaling
    raise AssertionError("every scaling has an alpha")


def test_a_scaling_that_no_alpha_gives_is_kept_by_rows_of_zeros(tmp_path):
    scaling = without_alpha(3)
    model = causal("llama", expert_scaling={FIRST: [scaling] * 4})
    model.export_expert("expert_0", tmp_path)
    made = stock("llama", tmp_path)
    layer, other = (made.base_model.model.get_submodule(name) for name in (FIRST, LAST))
    assert (
        layer.scaling["default"] == scaling and layer.r["default"] == 4 and other.r["default"] == 3
    )
    assert (
        not layer.lora_A["default"].weight[3].any()
        and not layer.lora_B["default"].weight[:, 3].any()
    )
    close(logits(made), forced(model, "expert_0"))


def test_the_bits_stay_the_same_on_the_way_out_and_back_in(tmp_path):
    model = causal("gpt2")
    model.freeze_experts("expert_1")
    for e in range(4):
        model.export_expert(f"expert_{e}", tmp_path / str(e))
        stored = load_file(tmp_path / str(e) / "adapter_model.safetensors")
        for linear, own in model.moelora.expert(e).items():
            assert torch.equal(stored[f"base_model.model.{linear}.lora_A.weight"], own.A)
            assert torch.equal(stored[f"base_model.model.{linear}.lora_B.weight"], own.B.T)
    again = MoeLoraForCausalLM.from_adapters(
        causal_base("gpt2"), {f"expert_{e}": str(tmp_path / str(e)) for e in range(4)}
    )
    for e in range(4):
        now = model.moelora.expert(e)
        then = again.moelora.expert(e)
        assert now.keys() == then.keys()
        for linear, own in now.items():
            assert torch.equal(own.A, then[linear].A) and torch.equal(own.B, then[linear].B)
        assert torch.equal(forced(model, f"expert_{e}"), forced(again, f"expert_{e}"))


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_adapters_that_came_in_go_out_as_they_were(name, tmp_path):
    """Ranks 4, 8, 16 and 32, patterns and rsLoRA: the tensors PEFT wrote, and its logits."""
    folders = mixed_adapters(tmp_path, name)
    model = MoeLoraForCausalLM.from_adapters(base_of(name), folders)
    for expert, folder in folders.items():
        model.export_expert(expert, tmp_path / "out" / expert)
        before = load_file(Path(folder) / "adapter_model.safetensors")
        after = load_file(tmp_path / "out" / expert / "adapter_model.safetensors")
        assert before.keys() == after.keys()
        assert all(torch.equal(before[key], after[key]) for key in before)
        found, expected = stock(name, tmp_path / "out" / expert), stock(name, Path(folder))
        assert torch.equal(logits(found), logits(expected))


def test_a_trained_head_goes_out_with_the_expert(tmp_path):
    model = classifier("bert")
    with torch.no_grad():
        model.classifier.weight.add_(1.0)
    model.export_expert("expert_0", tmp_path)
    made = stock("bert", tmp_path)
    close(logits(made), forced(model, "expert_0"))
    assert torch.equal(
        made.base_model.model.classifier.modules_to_save["default"].weight, model.classifier.weight
    )
    assert json.loads((tmp_path / "adapter_config.json").read_text())["task_type"] == "SEQ_CLS"


def test_a_head_that_is_adapted_itself_goes_out_as_lora(tmp_path):
    model = classifier("bert", target_modules=["query", "classifier"], modules_to_save=[])
    model.export_expert("expert_0", tmp_path)
    made = stock("bert", tmp_path)
    close(logits(made), forced(model, "expert_0"))
    assert hasattr(made.base_model.model.classifier, "lora_A")


def test_target_modules_are_short_where_that_is_exact_and_names_where_not(tmp_path):
    every, some = causal("llama", target_modules=["q_proj"]), causal("llama", **MIXED)
    written = []
    for number, model in enumerate((every, some)):
        model.export_expert("expert_1", tmp_path / str(number))
        written.append(json.loads((tmp_path / str(number) / "adapter_config.json").read_text()))
    assert written[0]["target_modules"] == ["q_proj"] and not written[0]["rank_pattern"]
    assert LAST in written[1]["target_modules"] and FIRST not in written[1]["target_modules"]
    assert set(written[1]["rank_pattern"].values()) >= {7} or written[1]["r"] == 7


def test_the_base_and_its_revision_are_named(tmp_path):
    causal_base("llama").save_pretrained(tmp_path / "base")
    model = activate(MoeLoraForCausalLM.from_base(str(tmp_path / "base")))
    model.moelora_config.base_revision = "abc"
    model.export_expert("expert_0", tmp_path / "out")
    written = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert written["base_model_name_or_path"] == str((tmp_path / "base").resolve())
    assert written["revision"] == "abc" and written["inference_mode"] is True


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtype_casts_what_is_written_and_leaves_the_masters(dtype, tmp_path):
    model = causal("llama")
    before = copy.deepcopy(model.state_dict())
    model.export_expert("expert_0", tmp_path, dtype=dtype)
    for linear, (A, _) in factors(model, 0).items():
        stored = load_file(tmp_path / "adapter_model.safetensors")[
            f"base_model.model.{linear}.lora_A.weight"
        ]
        assert torch.equal(stored, A.to(dtype))
    assert any(model.moelora.owns(key) for key in before)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_overwriting_replaces_an_adapter_and_nothing_else(tmp_path):
    model, folder = causal("llama"), tmp_path / "out"
    model.export_expert("expert_0", folder)
    with pytest.raises(FileExistsError, match="overwrite=True"):
        model.export_expert("expert_1", folder)
    close(logits(stock("llama", folder)), forced(model, "expert_0"))
    model.export_expert("expert_1", folder, overwrite=True)
    close(logits(stock("llama", folder)), forced(model, "expert_1"))
    (folder / "thesis.txt").write_text("years of work")
    with pytest.raises(FileExistsError, match=r"thesis\.txt.*delete"):
        model.export_expert("expert_0", folder, overwrite=True)
    assert (folder / "thesis.txt").read_text() and [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("at", ["writing", "replacing"])
def test_a_write_that_fails_leaves_what_was_there(at, tmp_path, monkeypatch):
    model, folder, rename = causal("llama"), tmp_path / "out", os.rename
    model.export_expert("expert_0", folder)
    before = {p.name: p.read_bytes() for p in folder.iterdir()}

    def failing(*args, **kwargs):
        raise OSError(28, "No space left on device")

    def failing_once(source, target):
        if Path(target) == folder and source.name.endswith(".new"):
            failing()
        rename(source, target)

    if at == "writing":
        monkeypatch.setattr("moelora.adapters.writing.save_file", failing)
    else:
        monkeypatch.setattr("moelora.checkpoint.atomic.os.rename", failing_once)
    with pytest.raises(OSError, match="No space left") as error:
        model.export_expert("expert_1", folder, overwrite=True)
    assert error.value.errno == 28 and str(folder) in str(error.value)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_what_a_killed_export_left_goes_with_the_next(tmp_path, monkeypatch):
    model, folder = causal("llama"), tmp_path / "out"
    model.export_expert("expert_0", folder)
    child = os.fork()
    if not child:
        # Killed with the new folder half written.
        monkeypatch.setattr("moelora.adapters.writing.save_file", lambda *_, **__: os._exit(9))
        model.export_expert("expert_1", folder, overwrite=True)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert len(list(tmp_path.iterdir())) > 1
    close(logits(stock("llama", folder)), forced(model, "expert_0"))
    model.export_expert("expert_1", folder, overwrite=True)
    close(logits(stock("llama", folder)), forced(model, "expert_1"))
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_what_cannot_be_exported_is_refused_and_nothing_is_written(tmp_path):
    model, out = causal("llama", expert_ranks={}), tmp_path / "out"
    with pytest.raises(ValueError, match=r"no expert 'law'.*expert_0, expert_1"):
        model.export_expert("law", out)
    with pytest.raises(TypeError, match="dtype=torch.int8"):
        model.export_expert("expert_0", out, dtype=torch.int8)
    (tmp_path / "file").write_text("x")
    with pytest.raises(FileExistsError, match="is a file"):
        model.export_expert("expert_0", tmp_path / "file")
    with pytest.raises(OSError, match="could not be written"):
        model.export_expert("expert_0", tmp_path / "file" / "below")
    with torch.no_grad():
        model.moelora.expert(0)[FIRST].B[0, 0] = 1e6
    with pytest.raises(
        ValueError, match=rf"lora_B of {FIRST} contains NaN or Inf in torch.float16"
    ):
        model.export_expert("expert_0", out, dtype=torch.float16)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file"]


def test_an_expert_without_a_rank_and_a_tied_head_are_refused(tmp_path):
    sites = {
        name: [3, 3, 3, 0]
        for name in expert_deltas(causal("llama", target_modules=["q_proj"]), "expert_0")
    }
    model = causal("llama", target_modules=["q_proj"], expert_ranks=sites)
    with pytest.raises(ValueError, match="rank 0 in every linear"):
        model.export_expert("expert_3", tmp_path)
    tied = into(
        causal_base("llama", tie_word_embeddings=True),
        modules_to_save=["lm_head"],
        target_modules=["q_proj"],
    )
    with pytest.raises(ValueError, match=r"embed_tokens\.weight is the same weight"):
        tied.export_expert("expert_0", tmp_path)
    assert not any(tmp_path.iterdir())


def test_names_that_end_alike_are_told_apart(tmp_path):
    """Targets and patterns are one linear's, also where the whole name is the end of another's."""

    def with_spare(base):
        base.spare = torch.nn.Module()
        base.spare.model = copy.deepcopy(base.model)
        return base

    # The linear in the spare takes a pattern of its own, and so does the one whose name it ends
    # with.
    sites = [*causal("llama", **MIXED).moelora_config.sites, [f"spare.{LAST}"]]
    config = MoeLoraConfig(num_experts=4, r=3, target_modules="all-linear", sites=sites, **MIXED)
    model = activate(put_into(with_spare(causal_base("llama")), config, MoeLoraForCausalLM))
    model.export_expert("expert_1", tmp_path)
    made = PeftModel.from_pretrained(with_spare(causal_base("llama")), str(tmp_path))
    adapted = {
        n.removeprefix("base_model.model."): m
        for n, m in made.named_modules()
        if hasattr(m, "lora_A")
    }
    deltas = expert_deltas(model, "expert_1")
    assert {n: m.r["default"] for n, m in adapted.items()} == {
        n: len(d.A) for n, d in deltas.items()
    }
    close(logits(made), forced(model, "expert_1"))
