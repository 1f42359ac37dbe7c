"""Reading PEFT folders: what is understood, what is refused and why, and what no file may do."""

from __future__ import annotations

import json
import os
import struct
import tracemalloc
from pathlib import Path

import pytest
import torch
from adapters.peft_folders import (
    CONFIG,
    WEIGHTS,
    edit_config,
    edit_tensors,
    peft_model,
    save_adapter,
)
from bases import VOCAB, causal_base
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

from moelora.adapters.reading import read_adapter

Q0, Q1 = (f"model.layers.{n}.self_attn.q_proj" for n in (0, 1))


@pytest.fixture
def folder(tmp_path):
    return save_adapter(tmp_path / "adapter")


def peft_layers(folder: str) -> dict:
    """PEFT's own LoRA layers by name, after it loaded the folder."""
    model = PeftModel.from_pretrained(causal_base(), folder).get_base_model()
    return {name: module for name, module in model.named_modules() if hasattr(module, "lora_A")}


FIELDS = {
    "plain": {},
    "alpha": {"r": 5, "lora_alpha": 11},
    "stable": {"r": 6, "lora_alpha": 5, "use_rslora": True},
    "patterns": {"rank_pattern": {"q_proj": 3}, "alpha_pattern": {"v_proj": 20, "q_proj": 1}},
    "first pattern wins": {"rank_pattern": {r".*\.0\..*": 2, "q_proj": 5}},
    "a pattern's end must match": {"rank_pattern": {"q_pro": 2, "self_attn": 3, "proj": 4}},
    "a pattern's anchor": {"rank_pattern": {"^model.layers.0.self_attn.q_proj": 2, "^q_proj": 3}},
    "stable patterns": {
        "rank_pattern": {"q_proj": 3},
        "alpha_pattern": {r"1\..*": 2.5},
        "use_rslora": True,
    },
    "layers": {"layers_to_transform": [1]},
    "regex": {"target_modules": r".*0\.mlp\.(up|down)_proj"},
    "all": {"target_modules": "all-linear", "exclude_modules": ["o_proj"]},
    "gaussian": {"init_lora_weights": "gaussian"},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "mica": {"init_lora_weights": "mica"},
    "dropout": {"lora_dropout": 0.5},
}


@pytest.mark.parametrize("fields", FIELDS.values(), ids=FIELDS)
def test_ranks_scalings_and_tensors_are_those_that_peft_uses(tmp_path, fields):
    folder = save_adapter(
        tmp_path / "adapter", causal_base(), **{"target_modules": ["q_proj", "v_proj"]} | fields
    )
    adapter, layers = read_adapter(folder), peft_layers(folder)
    assert adapter.problems == [] and set(adapter.targets) == set(layers)
    for name, target in adapter.targets.items():
        layer = layers[name]
        assert (target.r, target.scaling) == (layer.r["default"], layer.scaling["default"])
        A, B = adapter.factors(name)
        assert (target.a_shape, target.b_shape) == (A.shape, B.shape)
        assert torch.equal(A, layer.lora_A["default"].weight)
        assert torch.equal(B, layer.lora_B["default"].weight)
    assert adapter.nbytes == sum(4 * t.numel() for n in adapter.targets for t in adapter.factors(n))


def test_a_live_model_reads_as_its_folder(tmp_path):
    live = peft_model("llama", rank_pattern={"v_proj": 2}, use_rslora=True)
    live.save_pretrained(tmp_path)
    stored, alive = read_adapter(str(tmp_path)), read_adapter(live)
    assert stored.targets == alive.targets and not alive.problems
    assert all(
        torch.equal(s, a)
        for n in stored.targets
        for s, a in zip(stored.factors(n), alive.factors(n))
    )
    assert read_adapter(stored) is stored


REFUSED = {
    "bias": ({"bias": "lora_only"}, "trained biases"),
    "biased B": ({"lora_bias": True}, "B has a bias"),
    "dora": ({"use_dora": True}, "DoRA"),
    "embedding": ({"target_modules": ["embed_tokens"]}, "adapts an embedding"),
    "tokens": ({"trainable_token_indices": [1, 2]}, "trained token embeddings"),
    "replicated": ({"layer_replication": [[0, 2], [1, 2]]}, "adds layers"),
    "alora": ({"alora_invocation_tokens": [3], "task_type": "CAUSAL_LM"}, "aLoRA"),
    "pissa": ({"init_lora_weights": "pissa"}, "path_initial_model_for_weight_conversion"),
    "pissa by iteration": ({"init_lora_weights": "pissa_niter_4"}, "changed the base's weights"),
    "olora": ({"init_lora_weights": "olora"}, "changed the base's weights"),
}


@pytest.mark.parametrize(("fields", "reason"), REFUSED.values(), ids=REFUSED)
def test_what_is_no_plain_delta_on_the_base_is_refused(tmp_path, fields, reason):
    folder = save_adapter(
        tmp_path / "a", causal_base(), **{"target_modules": ["q_proj", "v_proj"]} | fields
    )
    adapter = read_adapter(folder)
    assert any(reason in problem for problem in adapter.problems), adapter.problems
    with pytest.raises(ValueError, match="cannot be read"):
        adapter.factors(next(iter(adapter.targets), Q0))


# Fields that PEFT cannot save here (other hardware, a data set), and ones that only a newer PEFT
# knows.
EDITED = {
    "kasa_config": {"beta": 1.0},
    "velora_config": {"num_groups": 4},
    "megatron_config": {"hidden_size": 32},
    "target_parameters": ["experts.down_proj"],
    "use_qalora": True,
    "monteclora_config": {"num_samples": 2},
    "use_bdlora": {"nblocks": 2},
    "arrow_config": {"top_k": 2},
    "ensure_weight_tying": True,
    "a_field_of_the_future": 3,
    "init_lora_weights": "of the future",
}


@pytest.mark.parametrize("name", EDITED)
def test_a_field_that_is_not_understood_is_named(folder, name):
    (problem,) = read_adapter(edit_config(folder, **{name: EDITED[name]})).problems
    assert problem.startswith(f"{name}=")


@pytest.mark.parametrize("value", [None, False, {}, []], ids=str)
def test_a_field_of_the_future_that_is_off_does_no_harm(folder, value):
    assert read_adapter(edit_config(folder, a_field_of_the_future=value)).problems == []


@pytest.mark.parametrize("how", ["corda", "lora_ga", "loftq"])
def test_other_initialisations_that_change_the_base_are_refused(folder, how):
    (problem,) = read_adapter(edit_config(folder, init_lora_weights=how)).problems
    assert "changed the base's weights" in problem


def test_other_peft_methods_are_refused(tmp_path):
    model = get_peft_model(
        causal_base(), IA3Config(target_modules=["q_proj"], feedforward_modules=[])
    )
    model.save_pretrained(tmp_path)
    assert read_adapter(str(tmp_path)).problems == [
        "peft_type is IA3; only LORA adapters can become experts"
    ]
    assert read_adapter(model).problems == read_adapter(str(tmp_path)).problems


def test_a_convolution_is_refused(tmp_path):
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Linear(4, 4))
    get_peft_model(net, LoraConfig(target_modules=["0"])).save_pretrained(tmp_path)
    assert any("only linears" in problem for problem in read_adapter(str(tmp_path)).problems)


def test_what_configuration_and_tensors_disagree_on_is_told(folder):
    assert (
        "rank 8 in the file and 1000000000"
        in read_adapter(edit_config(folder, r=10**9)).problems[0]
    )
    assert "give no rank" in read_adapter(edit_config(folder, r=0)).problems[0]
    assert "give no rank" in read_adapter(edit_config(folder, r="eight")).problems[0]
    assert (
        "give no rank" in read_adapter(edit_config(folder, r=8, rank_pattern={"(": 4})).problems[0]
    )
    edit_config(folder, rank_pattern={}, target_modules=["v_proj"])
    assert read_adapter(folder).problems == [f"its target_modules leaves out {q}" for q in (Q0, Q1)]
    edit_config(folder, target_modules=["q_proj", "v_proj"])
    edit_tensors(folder, **{"0_self_attn_q_proj_lora_B": None})
    assert read_adapter(folder).problems == [f"{Q0}.lora_B is missing"]
    edit_tensors(folder, **{"1_self_attn_q_proj_lora_A": lambda a: a[:5].clone()})
    assert any("do not fit together" in p for p in read_adapter(folder).problems)
    save_file({}, f"{folder}/{WEIGHTS}")
    assert "nothing in it" in read_adapter(folder).problems[0]


def test_missing_and_damaged_files_raise(tmp_path, folder):
    with pytest.raises(ValueError, match="no folder"):
        read_adapter(str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="is a file"):
        read_adapter(f"{folder}/{CONFIG}")
    with pytest.raises(ValueError, match=f"holds no {CONFIG}"):
        read_adapter(str(tmp_path))
    with pytest.raises(TypeError, match="came as a int"):
        read_adapter(3)
    weights, config = Path(folder) / WEIGHTS, Path(folder) / CONFIG
    whole = weights.read_bytes()
    for damage in (whole[:-100], whole[:3], b"", b"\x80\x02" + whole):
        weights.write_bytes(damage)
        with pytest.raises(ValueError, match="damaged, cut short"):
            read_adapter(folder)
    for text in ("{", "[]", '"r"', "[" * 100_000):
        config.write_text(text)
        with pytest.raises(ValueError, match="JSON"):
            read_adapter(folder)
    config.write_text(" " * 2**23)
    with pytest.raises(ValueError, match="expected at most"):
        read_adapter(folder)


def test_a_hub_id_that_cannot_be_reached_says_so():
    with pytest.raises(ValueError, match="not in the cache and cannot be reached"):
        read_adapter("nobody/no-such-adapter@main")
    with pytest.raises(ValueError, match="not a hub id either"):
        read_adapter("a/b/c")


def test_a_cached_hub_snapshot_reads_through_its_links(tmp_path, folder, monkeypatch):
    """The hub's cache keeps the files in blobs and links to them from the snapshot."""
    blobs = tmp_path / "models--someone--adapter" / "blobs"
    snapshot = blobs.parent / "snapshots" / ("a" * 40)
    for place in (blobs, snapshot, blobs.parent / "refs"):
        place.mkdir(parents=True)
    for name in (CONFIG, WEIGHTS):
        os.rename(f"{folder}/{name}", blobs / name)
        os.symlink(f"../../blobs/{name}", snapshot / name)
    (blobs.parent / "refs" / "main").write_text("a" * 40)
    assert len(read_adapter(str(snapshot)).targets) == 4
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert len(read_adapter("someone/adapter").targets) == 4


def test_pickles_are_refused_unread(tmp_path):
    peft_model("llama").save_pretrained(tmp_path, safe_serialization=False)
    assert (tmp_path / "adapter_model.bin").exists()
    with pytest.raises(
        ValueError, match=r"adapter_model\.bin: pickles can run code .*safe_serialization=True"
    ):
        read_adapter(str(tmp_path))


def test_a_huge_claim_in_a_small_file_allocates_nothing(folder):
    shape = [10**9, 32]
    for size in (2 * 4 * shape[0] * shape[1], 2**62):
        entry = {"dtype": "F32", "shape": shape, "data_offsets": [0, size // 2]}
        name = f"base_model.model.{Q0}.lora_A.weight"
        header = json.dumps({name: entry}).encode()
        with open(f"{folder}/{WEIGHTS}", "wb") as file:
            file.write(struct.pack("<Q", len(header)) + header + b"\0" * 64)
        tracemalloc.start()
        with pytest.raises(ValueError, match="damaged, cut short"):
            read_adapter(folder)
        assert tracemalloc.get_traced_memory()[1] < 2**20
        tracemalloc.stop()


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_no_link_leads_out_of_the_folder_and_every_file_is_a_file(tmp_path, folder, name):
    outside = tmp_path / "outside"
    os.rename(f"{folder}/{name}", outside)
    os.symlink(outside, f"{folder}/{name}")
    with pytest.raises(ValueError, match="links to .*copy the file itself"):
        read_adapter(folder)
    os.remove(f"{folder}/{name}")
    os.symlink(tmp_path / "dangling", f"{folder}/{name}")
    with pytest.raises(ValueError, match="links to"):
        read_adapter(folder)
    os.remove(f"{folder}/{name}")
    os.mkfifo(f"{folder}/{name}")
    with pytest.raises(ValueError, match="not a regular file"):
        read_adapter(folder)


def test_a_link_inside_the_folder_is_followed(folder):
    os.rename(f"{folder}/{WEIGHTS}", f"{folder}/weights")
    os.symlink("weights", f"{folder}/{WEIGHTS}")
    assert len(read_adapter(folder).targets) == 4


def test_biases_and_other_tensors_of_the_base_are_listed(tmp_path):
    folder = tmp_path / "a"
    peft_model("llama", modules_to_save=["model.norm"]).save_pretrained(folder)
    adapter = read_adapter(folder)
    assert adapter.saved == {"model.norm.weight": (32,)} and adapter.problems == []
    assert torch.equal(adapter.saved_tensor("model.norm.weight"), torch.ones(32))
    assert load_file(folder / WEIGHTS)["base_model.model.model.norm.weight"].shape == (32,)
    resized = causal_base()
    resized.resize_token_embeddings(VOCAB + 2)
    peft_model(resized, target_modules=["q_proj"]).save_pretrained(
        folder, save_embedding_layers=True
    )
    assert set(read_adapter(folder).saved) == {"model.embed_tokens.weight", "lm_head.weight"}
