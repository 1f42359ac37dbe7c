"""What surrounds the tensors when adapters are composed: configuration, routers, heads, X-LoRA,
undoing, size.
"""

from __future__ import annotations

import json
import shutil
import time

import pytest
import torch
from adapters.peft_folders import (
    edit_tensors,
    mixed_adapters,
    peft_logits,
    peft_model,
    save_adapter,
)
from bases import causal_base, classifier_base
from core.mixtures import own_parameters, tokens
from peft import PeftModel, XLoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from moelora import MoeLoraConfig, MoeLoraForCausalLM, MoeLoraForSequenceClassification
from moelora.adapters.composing import adapter_factors
from moelora.adapters.reading import read_adapter

IDS = tokens()


@pytest.fixture
def pair(tmp_path):
    """Two adapters that are alike but for their weights."""
    return {
        name: save_adapter(tmp_path / name, seed=seed) for seed, name in enumerate(("math", "code"))
    }


@torch.no_grad()
def forced(model, experts):
    with model.use_experts(experts):
        return model(input_ids=IDS).logits


def close(ours, theirs):
    return float((ours - theirs).abs().max() / theirs.abs().max()) < 1e-5


def test_like_adapters_make_a_short_configuration(pair):
    config = MoeLoraForCausalLM.from_adapters(causal_base(), pair).moelora_config
    assert (config.num_experts, config.expert_names) == (2, ["math", "code"])
    assert (config.r, config.lora_alpha, config.num_experts_per_tok) == (8, 8, 2)
    assert config.expert_ranks is None and config.expert_scaling is None
    assert len(config.target_modules) == 4


def test_only_what_differs_is_listed_by_linear(tmp_path):
    model = MoeLoraForCausalLM.from_adapters(causal_base(), mixed_adapters(tmp_path, "llama"))
    config, up = model.moelora_config, "model.layers.0.mlp.up_proj"
    assert config.r == [4, 8, 16, 32] and up not in config.target_modules
    assert config.expert_ranks["model.layers.0.self_attn.q_proj"] == [4, 5, 0, 0]
    assert config.expert_ranks["model.layers.1.self_attn.q_proj"] == [4, 5, 0, 32]
    assert config.scaling_of("model.layers.0.mlp.gate_proj")[1] == 3 / 2
    assert config.scaling_of("model.layers.0.mlp.gate_proj")[2] == 7 / 16**0.5


@pytest.mark.parametrize("scope", ["projection", "site", "layer", "model"])
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_the_given_configuration_says_how_it_is_routed(tmp_path, pair, scope, level):
    config = MoeLoraConfig(num_experts_per_tok=1, router_scope=scope, routing_level=level)
    model = MoeLoraForCausalLM.from_adapters(causal_base(), pair, config).eval()
    assert (
        model.moelora_config.router_scope == scope and model.moelora_config.num_experts_per_tok == 1
    )
    assert config.num_experts == 8 and config.target_modules is None
    assert close(forced(model, "code"), peft_logits("llama", pair["code"], IDS))


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"num_experts": 3}, "num_experts=3"),
        ({"num_experts": 2, "expert_names": ["code", "math"]}, "expert_names"),
        ({"r": 4}, "r=4"),
        ({"lora_alpha": 3}, "lora_alpha=3"),
        ({"target_modules": ["q_proj"]}, "target_modules"),
        ({"layers_to_transform": [0]}, "layers_to_transform"),
        ({"num_experts_per_tok": 5}, "num_experts_per_tok=5 is more than num_experts=2"),
    ],
    ids=str,
)
def test_a_configuration_that_contradicts_the_adapters_is_refused(pair, fields, told):
    with pytest.raises(ValueError, match=told):
        MoeLoraForCausalLM.from_adapters(causal_base(), pair, MoeLoraConfig(**fields))


def test_a_configuration_that_repeats_the_adapters_is_taken(pair):
    config = MoeLoraConfig(num_experts=2, expert_names=["math", "code"], r=8, lora_alpha=8)
    assert MoeLoraForCausalLM.from_adapters(causal_base(), pair, config).moelora_config.r == 8


def test_routers_start_as_asked(pair):
    model = MoeLoraForCausalLM.from_adapters(causal_base(), pair, router_init="arrow").eval()
    assert model.moelora_config.router == "arrow"
    assert model.route(input_ids=IDS).expert_share.isfinite().all()
    texts = {name: [row] for name, row in zip(pair, IDS)}
    model = MoeLoraForCausalLM.from_adapters(
        causal_base(), pair, router_init="prototype", texts=texts
    )
    assert all(r.weight.abs().max() > 0 for r in model.moelora.routers.values())
    base = causal_base()
    with pytest.raises(ValueError, match="arrow, prototype"):
        MoeLoraForCausalLM.from_adapters(base, pair, router_init="guess")
    assert type(base).__name__ == "LlamaForCausalLM" and not hasattr(base, "moelora")


def test_an_adapted_output_head_with_peft_s_copy_of_its_weight(tmp_path):
    """PEFT saves the base's head beside an adapter on it: the same bits as here are no training."""
    fields = {"target_modules": ["q_proj", "lm_head"]}
    for tied in (False, True):
        base = causal_base(tie_word_embeddings=tied)
        folder = tmp_path / str(tied)
        peft_model(base, **fields).save_pretrained(folder)
        assert "base_model.model.lm_head.base_layer.weight" in load_file(
            folder / "adapter_model.safetensors"
        )
        theirs = PeftModel.from_pretrained(causal_base(tie_word_embeddings=tied), folder).eval()
        model = MoeLoraForCausalLM.from_adapters(
            causal_base(tie_word_embeddings=tied), {"a": folder}
        ).eval()
        with torch.no_grad():
            assert close(forced(model, "a"), theirs(input_ids=IDS).logits)
    causal_base(seed=3).save_pretrained(tmp_path / "base")
    with pytest.raises(ValueError, match=r"trained weights of the base itself .*lm_head\.weight"):
        MoeLoraForCausalLM.from_adapters(tmp_path / "base", {"a": tmp_path / "False"})


def test_a_classifier_s_trained_head_is_refused_and_an_untrained_one_is_not(tmp_path):
    fields = {"target_modules": ["query"], "task_type": "SEQ_CLS"}
    folder = tmp_path / "head"
    peft_model(classifier_base(), **fields).save_pretrained(folder)
    model = MoeLoraForSequenceClassification.from_adapters(classifier_base(), {"a": folder})
    assert model.moelora_config.expert_names == ["a"]
    edit_tensors(folder, classifier_weight=lambda weight: weight + 1)
    with pytest.raises(ValueError, match=r"modules_to_save\): classifier\.weight"):
        MoeLoraForSequenceClassification.from_adapters(classifier_base(), {"a": folder})


def test_a_base_from_a_folder_and_its_keywords(tmp_path, pair):
    causal_base().save_pretrained(tmp_path / "base")
    model = MoeLoraForCausalLM.from_adapters(tmp_path / "base", pair, dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16
    assert all(p.dtype == torch.float32 for p in own_parameters(model).values())
    model.eval().save_pretrained(tmp_path / "mixture")
    again = MoeLoraForCausalLM.from_pretrained(tmp_path / "mixture").eval()
    assert again.dtype == torch.bfloat16 and torch.equal(
        forced(again, "code"), forced(model, "code")
    )
    with pytest.raises(ValueError, match="loaded already"):
        MoeLoraForCausalLM.from_adapters(causal_base(), pair, dtype=torch.bfloat16)
    with pytest.raises(TypeError, match="expected a hub id, a folder or a PreTrainedModel"):
        MoeLoraForCausalLM.from_adapters(3, pair)


def test_an_x_lora_checkpoint_gives_its_adapters_as_experts(tmp_path, pair):
    base = causal_base(use_cache=False)
    numbered = dict(zip("01", pair.values()))
    live = get_peft_model(
        base, XLoraConfig(task_type="CAUSAL_LM", hidden_size=32, adapters=numbered)
    )
    live.save_pretrained(tmp_path / "xlora")
    assert (
        json.loads((tmp_path / "xlora" / "adapter_config.json").read_text())["peft_type"] == "XLORA"
    )
    model = MoeLoraForCausalLM.from_adapters(causal_base(), tmp_path / "xlora").eval()
    assert model.moelora_config.expert_names == ["0", "1"]
    assert close(forced(model, "1"), peft_logits("llama", pair["code"], IDS))
    # Moved elsewhere: of what PEFT wrote beside, no adapter is whole, since one called "1" costs
    # the other layer 1.
    for folder in numbered.values():
        shutil.move(folder, f"{folder}-moved")
    with pytest.raises(ValueError, match=r"(?s)\| 0 \|.*X-LoRA model, without the layers.*\| 1 \|"):
        MoeLoraForCausalLM.from_adapters(causal_base(), tmp_path / "xlora")
    # With the adapters themselves in it, as on the hub.
    for name, folder in numbered.items():
        shutil.rmtree(tmp_path / "xlora" / name)
        shutil.move(f"{folder}-moved", tmp_path / "xlora" / name)
    moved = MoeLoraForCausalLM.from_adapters(causal_base(), tmp_path / "xlora").eval()
    assert torch.equal(forced(moved, "1"), forced(model, "1"))
    with pytest.raises(ValueError, match="X-LoRA checkpoint of several adapters"):
        MoeLoraForCausalLM.from_adapters(causal_base(), {"x": tmp_path / "xlora"})


def test_a_bad_set_leaves_the_base_as_it_was(tmp_path, pair):
    base = causal_base()
    before = {name: p.clone() for name, p in base.state_dict().items()}
    flags = [p.requires_grad for p in base.parameters()]
    edit_tensors(pair["code"], q_proj_lora_A=lambda a: a * float("nan"))
    with pytest.raises(ValueError, match=r"(?s)nothing was loaded.*\| code \|.*contains NaN"):
        MoeLoraForCausalLM.from_adapters(base, pair)
    assert type(base).__name__ == "LlamaForCausalLM" and not hasattr(base, "moelora")
    assert flags == [p.requires_grad for p in base.parameters()]
    assert all(torch.equal(p, before[name]) for name, p in base.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in base.modules())


def test_weights_that_vanish_while_loading_undo_everything(tmp_path, pair, monkeypatch):
    base, adapter = causal_base(), read_adapter(pair["math"])
    reads = iter(range(6))
    whole = adapter._read

    def failing(keys):
        if next(reads, None) is None:
            raise OSError("the disk is gone")
        return whole(keys)

    adapter._read = failing
    with pytest.raises(OSError, match="the disk is gone"):
        MoeLoraForCausalLM.from_adapters(base, {"math": adapter})
    assert type(base).__name__ == "LlamaForCausalLM" and not hasattr(base, "moelora")


def test_a_module_that_is_never_called_is_named(tmp_path):
    """Mamba's dt_proj has its weight read past its forward, where no expert can act."""
    folder = save_adapter(tmp_path / "a", causal_base("mamba"), target_modules=["x_proj"])
    tensors = {
        k.replace("x_proj", "dt_proj"): v
        for k, v in load_file(f"{folder}/adapter_model.safetensors").items()
    }
    tensors = {k: torch.zeros(8, 2) if "lora_A" in k else torch.zeros(64, 8) for k in tensors}
    save_file(tensors, f"{folder}/adapter_model.safetensors")
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text()) | {
        "target_modules": ["dt_proj"]
    }
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps(config))
    base = causal_base("mamba")
    with pytest.raises(ValueError, match="dt_proj"):
        MoeLoraForCausalLM.from_adapters(base, {"a": folder})
    assert type(base).__name__ == "MambaForCausalLM"


def test_a_base_with_adapters_inside_is_refused(pair):
    with pytest.raises(ValueError, match="PEFT adapters inside"):
        MoeLoraForCausalLM.from_adapters(
            PeftModel.from_pretrained(causal_base(), pair["math"]).get_base_model(), pair
        )


def test_sixty_four_adapters_grow_the_model_by_their_size_alone(tmp_path):
    live = peft_model("llama", r=4)
    live.save_pretrained(tmp_path / "a")
    one = sum(t.numel() for t in load_file(tmp_path / "a" / "adapter_model.safetensors").values())
    adapters = {f"expert{i}": str(tmp_path / "a") for i in range(64)}
    begin = time.perf_counter()
    model = MoeLoraForCausalLM.from_adapters(causal_base(), adapters).eval()
    assert time.perf_counter() - begin < 20
    each = (own for e in range(64) for own in model.moelora.expert(e).values())
    assert sum(own.A.numel() + own.B.numel() for own in each) == 64 * one
    assert close(forced(model, "expert63"), peft_logits("llama", adapters["expert63"], IDS))


def test_factors_of_one_adapter_for_a_mixture(tmp_path, pair):
    model = MoeLoraForCausalLM.from_adapters(causal_base(), {"math": pair["math"]})
    stored = load_file(f"{pair['code']}/adapter_model.safetensors")
    found = adapter_factors(pair["code"], model)
    assert set(found) == set(model.moelora_config.target_modules)
    for name, own in found.items():
        assert torch.equal(own.A, stored[f"base_model.model.{name}.lora_A.weight"])
        assert own.scaling == 1.0
        assert torch.equal(own.B.T, stored[f"base_model.model.{name}.lora_B.weight"])
    other = save_adapter(tmp_path / "other", causal_base(hidden_size=64))
    with pytest.raises(ValueError, match="wrong shapes"):
        adapter_factors(other, model)


@pytest.mark.parametrize("router", ["soft", "sparsegen"])
def test_routers_that_may_use_all_experts_use_all_adapters(pair, router):
    config = MoeLoraConfig(router=router)
    model = MoeLoraForCausalLM.from_adapters(causal_base(), pair, config)
    assert model.moelora_config.num_experts_per_tok == 2
    model.add_expert("law")
    assert model.moelora_config.num_experts_per_tok == 3
