"""Bases and checkpoints on the hub, without a network: commits are kept, uploads are whole."""

import json
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import safetensors.torch
import torch
import transformers.utils.hub
from bases import causal_base
from checkpoint.stored import WEIGHTS, load, mixture_on, same, saved, write_base
from huggingface_hub import ModelCard

from moelora import MoeLoraConfig, MoeLoraForCausalLM

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cached(tmp_path, monkeypatch):
    """Makes a hub cache that holds the repository `someone/tiny` at COMMIT, and keywords that find
    it.
    """
    # The keyword alone does not keep AutoModel from asking the network for an adapter.
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)

    def make(write):
        repository = tmp_path / "hub" / "models--someone--tiny"
        write(repository / "snapshots" / COMMIT)
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text(COMMIT)
        return {"cache_dir": tmp_path / "hub", "local_files_only": True}

    return make


def test_the_commit_of_a_hub_base_is_recorded_and_loaded(tmp_path, cached):
    offline = cached(write_base)
    model = MoeLoraForCausalLM.from_base(
        "someone/tiny", MoeLoraConfig(num_experts=2), **offline
    ).eval()
    model.save_pretrained(tmp_path / "experts")
    config = json.loads((tmp_path / "experts" / "config.json").read_text())
    assert (config["base_model_name_or_path"], config["base_revision"]) == ("someone/tiny", COMMIT)
    # The branch moves on; the checkpoint does not.
    (tmp_path / "hub" / "models--someone--tiny" / "refs" / "main").write_text("f" * 40)
    again = load(tmp_path / "experts", **offline)
    assert same(again, model)
    again.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "config.json").read_text())["base_revision"] == COMMIT


def test_a_self_contained_checkpoint_on_the_hub_lends_its_base_to_the_next(tmp_path, cached):
    model = mixture_on(causal_base())
    offline = cached(lambda folder: model.save_pretrained(folder, save_base=True))
    again = load("someone/tiny", **offline)
    assert same(again, model)
    again.save_pretrained(tmp_path / "experts")
    assert same(load(tmp_path / "experts", **offline), model)


def test_push_to_hub_uploads_the_checkpoint(tmp_path, monkeypatch):
    model = saved(tmp_path)
    sent = {}

    class Hub:
        def create_repo(self, repo_id, **kwargs):
            return SimpleNamespace(repo_id=repo_id)

        def create_commit(self, repo_id, operations, **kwargs):
            sent.update({o.path_in_repo: Path(o.path_or_fileobj).read_bytes() for o in operations})

    monkeypatch.setattr(transformers.utils.hub, "hf_api", Hub)
    monkeypatch.setattr(
        transformers.utils.hub, "create_and_tag_model_card", lambda *a, **k: ModelCard("# x")
    )
    model.push_to_hub("someone/experts")
    files = {"README.md", "config.json", "generation_config.json", "modeling_moelora.py", WEIGHTS}
    assert sent.keys() == files
    here = safetensors.torch.load_file(tmp_path / "experts" / WEIGHTS)
    there = safetensors.torch.load(sent[WEIGHTS])
    assert here.keys() == there.keys() and all(torch.equal(here[k], there[k]) for k in here)


def test_pushing_while_saving_is_refused_and_unknown_keywords_too(tmp_path):
    model = saved(tmp_path)
    with pytest.raises(ValueError, match=r"model\.push_to_hub"):
        model.save_pretrained(tmp_path / "pushed", push_to_hub=True)
    with pytest.raises(TypeError, match=r"\['save_bas'\].*save_base"):
        model.save_pretrained(tmp_path / "pushed", save_bas=True)
    assert not (tmp_path / "pushed").exists()
    # accelerate's idiom, and what push_to_hub passes.
    model.save_pretrained(
        tmp_path / "fine", is_main_process=True, save_function=None, max_shard_size="1GB"
    )
    model.save_pretrained(tmp_path / "other-process", is_main_process=False)
    assert same(load(tmp_path / "fine"), model) and not (tmp_path / "other-process").exists()
