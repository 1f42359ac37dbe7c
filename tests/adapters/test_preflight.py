"""The preflight: everything that is wrong with a whole set, in one table, before anything loads."""

from __future__ import annotations

import pytest
import torch
from adapters.peft_folders import WEIGHTS, edit_config, edit_tensors, mixed_adapters, save_adapter
from bases import causal_base, classifier_base
from peft import PeftModel
from safetensors.torch import load_file, save_file

from moelora import MoeLoraForCausalLM, MoeLoraForSequenceClassification
from moelora.adapters.preflight import preflight
from moelora.validation import expert_name_problem


@pytest.fixture
def good(tmp_path):
    return save_adapter(tmp_path / "good", r=3)


def problems_of(source, base=None, **options):
    """What is wrong with one adapter called `a`, without the name."""
    found = preflight(causal_base() if base is None else base, {"a": source}, **options).problems
    assert all(problem.startswith("a: ") for problem in found)
    return [problem.removeprefix("a: ") for problem in found]


def test_a_good_set_has_a_table_and_nothing_to_say(tmp_path, good):
    found = preflight(causal_base(), mixed_adapters(tmp_path, "llama") | {"good": good})
    assert found.ok and found.problems == [] and len(found.adapters) == 5
    found.raise_if_bad()
    lines = found.table().splitlines()
    assert lines[0] == "| adapter | r | targets | size | problems |" and len(lines) == 7
    assert lines[2] == "| small | 4 | 4 | 0.00 MB | none |"
    assert lines[3].startswith("| patterns | 2–8 | 8 |")


def bad_set(folder):
    """Adapters that are each wrong in another way."""
    made = {
        name: folder / name
        for name in ("shapes", "nan", "dora", "missing", "pickle", "layers", "dtype")
    }
    save_adapter(made["shapes"], causal_base(hidden_size=64))
    edit_tensors(save_adapter(made["nan"]), v_proj_lora_B=lambda b: b.fill_(float("inf")))
    save_adapter(made["dora"], use_dora=True)
    save_adapter(made["missing"], causal_base("gpt2"), target_modules=["c_attn"])
    save_adapter(made["pickle"])
    (made["pickle"] / WEIGHTS).rename(made["pickle"] / "adapter_model.bin")
    save_adapter(made["layers"], causal_base(num_hidden_layers=3))
    tensors = {
        k: v.double() for k, v in load_file(save_adapter(made["dtype"]) + f"/{WEIGHTS}").items()
    }
    save_file(tensors, made["dtype"] / WEIGHTS)
    return {name: str(path) for name, path in made.items()}


TOLD = {
    "shapes": "wrong shapes: model.layers.0.self_attn.q_proj (A [8, 64], B [64, 8]; "
    "expected [8, 32] and [32, 8])",
    "nan": "contains NaN or Inf: model.layers.0.self_attn.v_proj",
    "dora": "use_dora=True: DoRA rescales",
    "missing": "the base has no module: transformer.h.0.attn.c_attn, transformer.h.1.attn.c_attn",
    "pickle": "pickles can run code",
    "layers": "the base has no module: model.layers.2.self_attn.q_proj, "
    "model.layers.2.self_attn.v_proj (nearest: ",
    "dtype": "F64 cannot be held exactly; save it in F32: model.layers.0.self_attn.q_proj",
    "../up": "must be fit for a folder",
}


@pytest.mark.parametrize("loaded", [True, False], ids=["loaded", "folder"])
def test_everything_that_is_wrong_is_listed_at_once(tmp_path, good, loaded):
    base = causal_base()
    base.save_pretrained(tmp_path / "base")
    base = base if loaded else tmp_path / "base"
    found = preflight(base, bad_set(tmp_path) | {"../up": good, "good": good})
    for name, told in TOLD.items():
        assert any(p.startswith(f"{name}: ") and told in p for p in found.problems), (
            name,
            found.problems,
        )
    assert not any(p.startswith("good: ") for p in found.problems) and not found.ok
    table = found.table()
    assert len(table.splitlines()) == 2 + 9
    assert all(told in table for told in TOLD.values())
    with pytest.raises(ValueError) as error:
        found.raise_if_bad()
    assert "8 of 9 adapters" in str(error.value) and table in str(error.value)


def test_no_weights_are_loaded_for_a_base_that_is_only_named(tmp_path, good):
    base = causal_base()
    base.config.save_pretrained(tmp_path / "base")
    assert preflight(tmp_path / "base", {"good": good}).ok
    assert preflight(str(tmp_path / "base"), {"good": good}).ok
    with pytest.raises(OSError, match="nowhere"):
        preflight(tmp_path / "nowhere", {"good": good})
    with pytest.raises(TypeError, match="expected a hub id, a folder or a PreTrainedModel"):
        preflight(torch.nn.Linear(2, 2), {"good": good})
    with pytest.raises(ValueError, match="PEFT adapters inside"):
        preflight(PeftModel.from_pretrained(causal_base(), good).get_base_model(), {"good": good})


def test_a_folder_of_a_classifier_is_checked_as_one(tmp_path):
    base = classifier_base()
    base.save_pretrained(tmp_path / "base")
    good = save_adapter(tmp_path / "good", "bert")
    assert preflight(tmp_path / "base", {"good": good}).ok
    assert problems_of(save_adapter(tmp_path / "llama"), tmp_path / "base")
    model = MoeLoraForSequenceClassification.from_adapters(tmp_path / "base", {"good": good})
    assert model.moelora_config.expert_names == ["good"]


def test_another_base_s_adapter_is_a_problem_unless_allowed(tmp_path, good):
    base = causal_base()
    base.config._name_or_path = "someone/llama-tiny"
    for same in (None, "", "someone/llama-tiny", "a-mirror/llama-tiny", "folders/Llama-Tiny/"):
        assert problems_of(edit_config(good, base_model_name_or_path=same), base) == []
    edit_config(good, base_model_name_or_path="someone/llama-small")
    (problem,) = problems_of(good, base)
    assert problem.startswith("it was trained on someone/llama-small, not on someone/llama-tiny")
    assert problems_of(good, base, allow_base_mismatch=True) == []
    assert problems_of(good, causal_base()) == []
    cached = "cache/models--someone--llama-small/snapshots/0123"
    base.config._name_or_path = cached
    assert problems_of(good, base) == []
    base.config._name_or_path = "someone/llama-tiny"
    with pytest.raises(ValueError, match="allow_base_mismatch"):
        MoeLoraForCausalLM.from_adapters(base, {"a": good})
    model = MoeLoraForCausalLM.from_adapters(base, {"a": good}, allow_base_mismatch=True)
    assert model.moelora_config.num_experts == 1


UNFIT = [
    "",
    " ",
    "a/b",
    "a\\b",
    ".hidden",
    "..",
    "a.",
    " a",
    "a\n",
    "a\0",
    "a:b",
    "con",
    "NUL.txt",
    "x" * 97,
]


@pytest.mark.parametrize("name", [*UNFIT, 3], ids=repr)
def test_names_that_are_unfit_for_a_folder(good, name):
    (problem,) = preflight(causal_base(), {name: good}).problems
    assert "name" in problem


@pytest.mark.parametrize("name", ["math", "de-DE_1.5", "Mathe für alle", "数学", "expert_0"])
def test_names_that_are_fit(name):
    assert expert_name_problem(name) is None


def test_names_given_twice(good):
    found = preflight(
        causal_base(), [("math", good), ("code", good), ("math", good), ("Code", good)]
    )
    assert len(found.problems) == 4 and all("given twice" in problem for problem in found.problems)


def test_what_is_no_set_of_adapters(good, tmp_path):
    for nothing in ({}, []):
        with pytest.raises(ValueError, match="no adapters"):
            preflight(causal_base(), nothing)
    for no_pairs in (3, [good, good], [3]):
        with pytest.raises(TypeError, match="expected"):
            preflight(causal_base(), no_pairs)
    with pytest.raises(ValueError, match="not an X-LoRA checkpoint"):
        preflight(causal_base(), good)
    with pytest.raises(ValueError, match="holds no adapter_config"):
        preflight(causal_base(), tmp_path)
    assert "came as a int" in problems_of(3)[0]


def test_a_trained_head_is_a_problem_before_the_base_is_loaded(tmp_path):
    causal_base().save_pretrained(tmp_path / "base")
    folder = save_adapter(tmp_path / "head", target_modules=["q_proj"], modules_to_save=["lm_head"])
    (problem,) = problems_of(folder, tmp_path / "base")
    assert "trained weights of the base itself (modules_to_save): lm_head.weight" in problem
    # The same bits as the base's: there was nothing to train it.
    assert problems_of(folder) == []


def test_a_double_precision_base_takes_double_precision_adapters(tmp_path):
    folder = tmp_path / "a"
    save_adapter(folder)
    save_file({k: v.double() for k, v in load_file(folder / WEIGHTS).items()}, folder / WEIGHTS)
    assert problems_of(str(folder), causal_base().double()) == []


def test_a_pipe_in_a_message_keeps_the_table_whole(good):
    found = preflight(causal_base(), {"a|b": good, "c": edit_config(good, future="x|y")})
    assert all(line.replace("\\|", "").count("|") == 6 for line in found.table().splitlines())
