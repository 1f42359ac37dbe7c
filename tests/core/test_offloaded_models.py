"""What else is done with a model whose experts are offloaded: changed, saved, copied, moved."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import accelerate
import pytest
import torch
from bases import causal_base
from core.mixtures import causal, tokens
from transformers import AutoModelForCausalLM

from moelora import MoeLoraForCausalLM

MANY = {"num_experts": 12, "num_experts_per_tok": 2}
# Sums are taken in another order where a batch is computed in parts.
TOLERANCE = 2e-5


def test_gradients_are_refused_not_left_out():
    model = causal(**MANY)
    ids = tokens()
    model.offload_experts(resident=12)
    model.train()
    with pytest.raises(ValueError, match="cannot train while its experts are offloaded"):
        model(ids, labels=ids)
    model.eval()
    with torch.no_grad():
        expected = model(ids, labels=ids)
    found = model(ids, labels=ids)
    assert torch.equal(found.logits, expected.logits)
    with pytest.raises(RuntimeError, match="onload_experts"):
        found.loss.backward()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora" in name)
    with pytest.raises(RuntimeError, match="onload_experts"):
        model(ids, labels=ids).loss.backward()
    model.onload_experts()
    model.train()(ids, labels=ids).loss.backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if "lora_B" in n)


@torch.no_grad()
def test_a_changed_expert_is_fetched_again():
    model = causal(**MANY)
    ids = tokens(1, 2)
    model.offload_experts(resident=12)
    model(ids)
    for site in model.moelora.sites.values():
        for factor in site.factors()[1:]:
            factor.weight.mul_(2.0)
    found = model(ids).logits
    model.onload_experts()
    assert torch.equal(found, model(ids).logits)
    # Loaded, too.
    other = causal(**MANY, r=3)
    for site in other.moelora.sites.values():
        site.lora_A.weight.add_(0.1)
    model.offload_experts(resident=12)
    model(ids)
    model.load_state_dict(other.state_dict())
    assert torch.equal(model(ids).logits, other(ids).logits)


@torch.no_grad()
def test_the_pool_changes_while_it_is_offloaded(tmp_path):
    model = causal(**MANY)
    other = causal(**MANY)
    other.offload_experts(resident=4)
    ids = tokens()
    for own in (model, other):
        own(ids)
        own.add_expert("newcomer", copy_of="expert_3", noise=0.1, seed=0)
        own.remove_expert("expert_5")
        own.replace_expert("expert_6", copy_of="expert_1")
        own.export_expert("newcomer", tmp_path / str(id(own)))
    torch.testing.assert_close(other(ids).logits, model(ids).logits, rtol=TOLERANCE, atol=TOLERANCE)
    files = [tmp_path / str(id(own)) / "adapter_model.safetensors" for own in (model, other)]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert other.expert_cache_report().num_experts == 12
    torch.testing.assert_close(
        other.merge_and_unload({"newcomer": 0.5})(ids).logits,
        model.merge_and_unload({"newcomer": 0.5})(ids).logits,
    )


@torch.no_grad()
def test_unloading_gives_the_base_back():
    model = causal(**MANY)
    model.offload_experts(resident=4)
    ids = tokens()
    model(ids)
    assert torch.equal(model.unload()(ids).logits, causal_base()(ids).logits)


@torch.no_grad()
def test_copies_have_slots_of_their_own():
    model = causal(**MANY)
    ids = tokens()
    model.offload_experts(resident=12)
    expected = model(ids).logits
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert other.moelora.resident_experts == 12
        assert not next(iter(other.moelora.sites.values())).tier.slot_of
        assert torch.equal(other(ids).logits, expected)
        for site in other.moelora.sites.values():
            site.lora_A.weight.zero_()
        assert not torch.equal(other(ids).logits, expected)
    assert torch.equal(model(ids).logits, expected)


@torch.no_grad()
@pytest.mark.parametrize("through_auto", [False, True])
def test_saving_and_loading(tmp_path, through_auto):
    model = causal(**MANY)
    ids = tokens()
    expected = model(ids).logits
    model.offload_experts(resident=4)
    model.save_pretrained(tmp_path, save_base=True)
    loader = AutoModelForCausalLM if through_auto else MoeLoraForCausalLM
    assert torch.equal(loader.from_pretrained(tmp_path)(ids).logits, expected)
    loaded = loader.from_pretrained(tmp_path, resident_experts=12)
    assert torch.equal(loaded(ids).logits, expected)
    # Its rows are those of the file.
    if Path("/proc/self/maps").exists():
        mapped = Path("/proc/self/maps").read_text(encoding="utf-8")
        assert str(tmp_path / "model.safetensors") in mapped
    loaded.save_pretrained(tmp_path)
    assert torch.equal(loaded(ids).logits, expected)
    loaded.onload_experts()
    assert torch.equal(loaded(ids).logits, expected)
    loaded.train()(ids, labels=ids)


@torch.no_grad()
def test_the_rows_stay_where_they_are_when_the_model_moves():
    model = causal(**MANY)
    model.offload_experts(resident=4)
    ids = tokens()
    model.double()
    assert {p.dtype for p in model.moelora.factors().__next__().parameters()} == {torch.float64}
    found = model(ids).logits
    model.onload_experts()
    torch.testing.assert_close(model(ids).logits, found)
    model.offload_experts(resident=4)
    model.to("meta")
    assert {p.device.type for own in model.moelora.factors() for p in own.parameters()} == {"cpu"}


@torch.no_grad()
def test_an_engine_that_takes_the_rows_away_is_named():
    model = causal(**MANY)
    model.offload_experts(resident=4)
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    with pytest.raises(ValueError, match="onload_experts"):
        model(tokens())
