"""Bases that are quantised, dispatched or offloaded: from_pretrained's keywords, and models that
accelerate moves.
"""

from __future__ import annotations

import accelerate
import pytest
import torch
from bases import VOCAB, causal_base
from core.mixtures import LEVELS, SCOPES, causal, own_parameters
from transformers import AutoModelForCausalLM, QuantoConfig, Trainer, TrainingArguments

from moelora import MoeLoraConfig, MoeLoraForCausalLM

ALL = dict(num_experts=4, r=4, target_modules="all-linear")


@pytest.mark.parametrize("scope", ["site", "layer", "model"])
def test_offloaded_weights(scope):
    base = causal_base()
    ids = torch.randint(3, VOCAB, (2, 9))
    expected = base(input_ids=ids).logits
    accelerate.cpu_offload(base, execution_device=torch.device("cpu"))
    assert next(base.model.layers[0].parameters()).device.type == "meta"
    model = MoeLoraForCausalLM.from_base(base, MoeLoraConfig(**ALL, router_scope=scope))
    tensors = (*own_parameters(model).values(), *model.moelora.buffers())
    assert {tensor.device.type for tensor in tensors} == {"cpu"}
    outputs = model(input_ids=ids, output_expert_routing=True)
    assert torch.equal(outputs.logits, expected)
    assert len(outputs.expert_routing) == len(model.moelora.routers)
    # The base's forward is back where accelerate keeps it.
    assert torch.equal(model.unload()(input_ids=ids).logits, expected)


def test_a_device_map(tmp_path):
    causal_base().save_pretrained(tmp_path)
    model = MoeLoraForCausalLM.from_base(
        tmp_path, MoeLoraConfig(**ALL), device_map={"": "cpu"}, dtype=torch.bfloat16
    )
    assert model.dtype == torch.bfloat16
    ids = torch.randint(3, VOCAB, (1, 5))
    assert model.generate(input_ids=ids, max_new_tokens=3, do_sample=False).shape[1] > 5


def test_a_quantised_base_trains_saves_and_comes_back(tmp_path):
    causal_base().save_pretrained(tmp_path / "base")
    quantisation = dict(quantization_config=QuantoConfig(weights="int8"))
    model = MoeLoraForCausalLM.from_base(tmp_path / "base", MoeLoraConfig(**ALL), **quantisation)
    assert type(model.model.layers[0].self_attn.q_proj).__name__ == "QLinear"
    assert len(model.moelora_config.sites) == 8
    before = {n: p.detach().clone() for n, p in own_parameters(model).items()}
    ids = torch.randint(3, VOCAB, (8, 9))
    arguments = TrainingArguments(
        str(tmp_path / "out"), max_steps=3, learning_rate=1e-2, report_to="none", use_cpu=True
    )
    rows = [{"input_ids": row, "labels": row} for row in ids]
    Trainer(model=model, args=arguments, train_dataset=rows).train()
    assert all(not torch.equal(p, before[n]) for n, p in own_parameters(model).items())

    model.save_pretrained(tmp_path / "mixture")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "mixture", **quantisation)
    assert torch.equal(again(input_ids=ids).logits, model.eval()(input_ids=ids).logits)


def _offloaded(model, how, folder):
    if how == "cpu":
        return accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    if how == "buffers too":
        return accelerate.cpu_offload(
            model, execution_device=torch.device("cpu"), offload_buffers=True
        )
    if how == "disk":
        return accelerate.disk_offload(model, folder, execution_device=torch.device("cpu"))
    layers = {f"model.layers.{i}": "cpu" if i else "disk" for i in range(len(model.model.layers))}
    rest = dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb"), "cpu")
    device_map = {**layers, **rest, "lm_head": "cpu", "moelora": "cpu"}
    return accelerate.dispatch_model(model, device_map, "cpu", offload_dir=folder)


@torch.no_grad()
@pytest.mark.parametrize("how", ["cpu", "buffers too", "disk", "device map"])
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("scope", SCOPES)
def test_a_mixture_is_offloaded_with_its_base(scope, level, how, tmp_path):
    fields = dict(router_scope=scope, routing_level=level, router_bias_update_rate=0.01)
    model = causal(**fields)
    model.moelora.load.bias.normal_()
    ids = torch.randint(3, VOCAB, (2, 9))
    expected = model(ids).logits
    generated = model.generate(ids, max_new_tokens=4, do_sample=False)
    _offloaded(model, how, str(tmp_path))
    if how != "device map":
        assert all(p.device.type == "meta" for p in own_parameters(model).values())
    assert torch.equal(model(ids).logits, expected)
    assert torch.equal(model.generate(ids, max_new_tokens=4, do_sample=False), generated)
