"""What a save never overwrites: a base, or whatever moelora did not write."""

import json
import os

import pytest
import safetensors.torch
import torch
from bases import causal_base
from checkpoint.stored import WEIGHTS, contents, load, mixture_on, same, saved, write_base

from moelora import MoeLoraConfig, MoeLoraForCausalLM

CONFIG = MoeLoraConfig(num_experts=2, r=2, target_modules="all-linear")


def _refuses(model, folder):
    before = contents(folder)
    for save_base in (False, True):
        with pytest.raises(ValueError, match="model that moelora did not write"):
            model.save_pretrained(folder, save_base=save_base)
    assert contents(folder) == before


def test_the_base_s_own_folder(tmp_path):
    _refuses(mixture_on(write_base(tmp_path / "base")), tmp_path / "base")


def test_a_base_in_a_subfolder(tmp_path):
    write_base(tmp_path / "repository" / "tiny")
    model = MoeLoraForCausalLM.from_base(tmp_path / "repository", CONFIG, subfolder="tiny").eval()
    _refuses(model, tmp_path / "repository" / "tiny")
    model.save_pretrained(tmp_path / "experts")
    assert same(load(tmp_path / "experts"), model)


@pytest.mark.parametrize("loaded", [False, True])
def test_a_base_of_a_relative_path_after_chdir(tmp_path, monkeypatch, loaded):
    write_base(tmp_path / "here" / "base")
    write_base(tmp_path / "there" / "base", seed=7)
    monkeypatch.chdir(tmp_path / "here")
    base = type(causal_base()).from_pretrained("base") if loaded else "base"
    model = MoeLoraForCausalLM.from_base(base, CONFIG).eval()
    monkeypatch.chdir(tmp_path / "there")
    _refuses(model, tmp_path / "here" / "base")
    _refuses(model, tmp_path / "there" / "base")
    model.save_pretrained("experts")
    config = json.loads((tmp_path / "there" / "experts" / "config.json").read_text())
    assert config["base_model_name_or_path"] == str(tmp_path / "here" / "base")
    assert same(load("experts"), model)
    # What is loaded from a relative path refers to an absolute one, too.
    again = load(os.path.relpath(tmp_path / "there" / "experts"), base="../here/base")
    monkeypatch.chdir(tmp_path)
    again.save_pretrained("again")
    assert same(load("again"), model)


@pytest.mark.parametrize(
    "name", [WEIGHTS, "config.json", "model.safetensors.index.json", "pytorch_model.bin"]
)
@pytest.mark.parametrize("kind", ["foreign", "damaged"])
def test_one_file_of_another_model(tmp_path, name, kind):
    folder = tmp_path / "theirs"
    folder.mkdir()
    if kind == "damaged":
        (folder / name).write_text("{ not whole")
    elif name == WEIGHTS:
        safetensors.torch.save_file({"a": torch.zeros(1)}, folder / WEIGHTS)
    else:
        (folder / name).write_text('{"model_type": "llama"}')
    _refuses(mixture_on(causal_base()), folder)


def test_a_foreign_config_beside_weights_of_ours_and_the_other_way_round(tmp_path):
    model = saved(tmp_path)
    folder = tmp_path / "experts"
    ours = contents(folder)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    _refuses(model, folder)
    (folder / "config.json").write_bytes(ours["config.json"])
    safetensors.torch.save_file({"a": torch.zeros(1)}, folder / WEIGHTS)
    _refuses(model, folder)


@pytest.mark.parametrize("name", [WEIGHTS, "config.json"])
def test_a_damaged_checkpoint_of_ours_may_be_replaced(tmp_path, name):
    model = saved(tmp_path)
    folder = tmp_path / "experts"
    (folder / name).write_bytes(b"cut")
    (folder / "tokenizer.json").write_text("{}")
    model.save_pretrained(folder)
    assert same(load(folder), model) and (folder / "tokenizer.json").read_text() == "{}"


@pytest.mark.parametrize("value", [torch.nan, -torch.inf])
def test_weights_that_are_not_finite_do_not_replace_good_ones(tmp_path, value):
    model = saved(tmp_path)
    before = contents(tmp_path / "experts")
    with torch.no_grad():
        next(iter(model.moelora.expert(1).values())).A[0, 0] = value
    with pytest.raises(ValueError, match=r"lora_A\.weight contains NaN or Inf \(1 in all\)"):
        model.save_pretrained(tmp_path / "experts")
    assert contents(tmp_path / "experts") == before


@pytest.mark.parametrize("folder", [None, 5, b"bytes"])
def test_a_folder_that_is_not_a_path(folder):
    with pytest.raises(TypeError, match=r"save_directory=.* expected the path of a folder"):
        mixture_on(causal_base()).save_pretrained(folder)
