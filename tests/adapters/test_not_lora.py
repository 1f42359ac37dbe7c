"""Experts that are no LoRAs: kept and loaded as a whole, and refused by what knows LoRA alone."""

from __future__ import annotations

import peft
import pytest
import torch
from bases import causal_base
from core.adapter_forms import FFN, form, made
from core.mixtures import tokens
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from moelora import MoeLoraConfig, MoeLoraForCausalLM
from moelora.training.router_init import initialise
from moelora_cli import app

WHY = {
    "bottleneck": "expert_activation='tanh' acts between A and B",
    "series": "expert_placement='series' reads what modules give",
    "block": r"target_blocks=\['mlp'\] are more than one linear",
}


@pytest.fixture
def adapter(tmp_path):
    """A stock PEFT LoRA of the tiny base."""
    lora = peft.LoraConfig(target_modules=["down_proj"], r=2)
    peft.get_peft_model(causal_base(), lora).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def _mixture(kind):
    """Of which one reason alone makes it no LoRA."""
    return made("llama", kind, "tanh" if kind == "bottleneck" else None)


@pytest.mark.parametrize("kind", WHY)
def test_what_is_for_lora_alone_is_refused(kind, adapter, tmp_path):
    model = _mixture(kind)
    expected = model(tokens()).logits
    out = tmp_path / "out"
    weights = {"expert_0": 1.0}
    for refused in (
        lambda: model.export_expert("expert_0", out),
        lambda: model.export_merged(weights, out),
        lambda: model.merge_and_unload(weights),
        lambda: model.add_expert("law", adapter=adapter),
        lambda: model.replace_expert("expert_0", adapter=adapter),
        lambda: initialise(model, "arrow"),
    ):
        with pytest.raises(ValueError, match=f"{WHY[kind]}.*save_pretrained"):
            refused()
    assert not out.exists()
    assert torch.equal(model(tokens()).logits, expected)


@pytest.mark.parametrize("kind", WHY)
def test_adapters_of_peft_do_not_become_such_experts(kind, adapter):
    activation = "tanh" if kind == "bottleneck" else None
    fields = {**form("llama", kind, activation), "target_modules": None}
    config = MoeLoraConfig(num_experts=1, num_experts_per_tok=1, **fields)
    with pytest.raises(ValueError, match=f"from_adapters.*{WHY[kind]}"):
        MoeLoraForCausalLM.from_adapters(causal_base(), {"a": adapter}, config)


@pytest.mark.parametrize("kind", ["series", "both"])
@pytest.mark.parametrize("name", FFN)
def test_saved_and_loaded(name, kind, tmp_path):
    causal_base(name).save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = made(name, kind, "gelu", base=base)
    model.save_pretrained(tmp_path / "mixture")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "mixture").eval()
    own = again.moelora_config
    assert (own.expert_activation, own.sites) == ("gelu", model.moelora_config.sites)
    assert torch.equal(again(tokens()).logits, model(tokens()).logits)
    said = CliRunner().invoke(app, ["info", str(tmp_path / "mixture")])
    assert said.exit_code == 0, said.output


def test_the_parameters_that_info_counts_are_those_that_train(tmp_path):
    model = made("opt", "both", "relu")
    model.save_pretrained(tmp_path)
    said = CliRunner().invoke(app, ["info", str(tmp_path)]).output
    number = sum(f.A.numel() + f.B.numel() for f in model.moelora.expert(0).values())
    assert f"{number:,}" in said


@pytest.mark.parametrize(
    "field, value", [("expert_activation", "relu"), ("target_blocks", ["mlp"])]
)
def test_a_checkpoint_keeps_its_form(field, value, tmp_path):
    made("llama", "bottleneck").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"{field} cannot be changed when loading"):
        MoeLoraForCausalLM.from_pretrained(tmp_path, base=causal_base(), **{field: value})


@pytest.mark.parametrize(
    "fields, error, match",
    [
        ({"expert_activation": "swish"}, ValueError, "relu, gelu, silu, tanh"),
        ({"expert_activation": 1}, ValueError, "expert_activation"),
        ({"expert_placement": "before"}, ValueError, "parallel, series"),
        ({"expert_placement": None}, ValueError, "parallel, series"),
        ({"target_blocks": "mlp"}, TypeError, "list of non-empty strings"),
        ({"target_blocks": []}, ValueError, "target_blocks is empty"),
        ({"block_sizes": {"mlp": [32, 0]}}, TypeError, "block_sizes.*two widths a block"),
        ({"block_sizes": [[32, 32]]}, TypeError, "leave it to save_pretrained"),
        ({"target_blocks": ["a->b->c"]}, ValueError, "'a->b->c'.*fc1->fc2"),
        ({"target_blocks": ["fc1 -> fc2"]}, ValueError, "'fc1 -> fc2'"),
        ({"target_blocks": ["->fc2"]}, ValueError, "'->fc2'"),
        (
            {"target_blocks": ["fc1->fc2"], "expert_placement": "series"},
            ValueError,
            "Name 'fc2' alone",
        ),
    ],
)
def test_impossible_forms_are_refused_when_the_config_is_made(fields, error, match):
    with pytest.raises(error, match=match):
        MoeLoraConfig(**fields)
