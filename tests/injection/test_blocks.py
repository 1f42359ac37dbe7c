"""Blocks and spans of a base as places for experts: which are found, and which are refused."""

from __future__ import annotations

import pytest
import torch
from bases import causal_base, classifier_base
from core.adapter_forms import FFN
from core.mixtures import SCOPES, adapted, into, tokens
from injection.test_targets import refused

from moelora import MoeLoraConfig
from moelora.injection.sites import find_sites


def _sites(base, **fields):
    config = MoeLoraConfig(**{"num_experts": 4, **fields})
    return find_sites(base, config, False, {})


@pytest.mark.parametrize("name", FFN)
def test_the_ffn_alone_in_the_layers_that_were_asked_for(name):
    base = causal_base(name)
    sites = _sites(base, target_blocks=FFN[name], layers_to_transform=[1])
    assert len(sites) == 1 and len(sites[0]) == 1 and ".1." in sites[0][0]
    assert len(_sites(base, target_blocks=FFN[name])) == 2


@pytest.mark.parametrize("name", FFN)
def test_meta_weights_give_the_blocks_of_real_ones(name):
    with torch.device("meta"):
        meta = causal_base(name)
    fields = {"target_blocks": FFN[name], "target_modules": "all-linear"}
    assert _sites(meta, **fields) == _sites(causal_base(name), **fields)
    model = into(meta, active=False, probe=True, **fields)
    assert {p.device.type for p in model.parameters()} == {"meta"}


def test_a_block_shares_the_site_of_linears_that_read_the_same_tensor():
    sites = _sites(causal_base(), target_blocks=["mlp"], target_modules="all-linear")
    layer = "model.layers.0.mlp"
    assert [f"{layer}.gate_proj", f"{layer}.up_proj", layer] in sites
    sites = _sites(causal_base("opt"), target_blocks=["fc1->fc2"], target_modules=["fc1", "fc2"])
    layer = "model.decoder.layers.0"
    assert [f"{layer}.fc1", f"{layer}.fc1->{layer}.fc2"] in sites


def test_in_series_every_module_is_a_site_of_its_own():
    sites = _sites(causal_base(), target_modules="all-linear", expert_placement="series")
    assert len(sites) == 14 and all(len(site) == 1 for site in sites)
    model = into(causal_base(), target_modules=["up_proj", "down_proj"], expert_placement="series")
    widths = {
        name.rpartition(".")[2]: (site.lora_A.width, site.lora_B[0].width)
        for name, (site, _) in adapted(model).items()
    }
    assert widths == {"up_proj": (48, 48), "down_proj": (32, 32)}


def test_without_target_modules_no_linear_is_adapted_beside_a_block():
    assert set(adapted(into(causal_base(), target_modules=None, target_blocks=["mlp"]))) == {
        "model.layers.0.mlp",
        "model.layers.1.mlp",
    }


def test_a_span_may_go_through_modules():
    model = into(
        causal_base(),
        target_modules=None,
        target_blocks=["post_attention_layernorm->mlp.down_proj"],
        layers_to_transform=0,
    )
    (site,) = model.moelora.sites.values()
    assert site.path == "model.layers.0.moelora.sites.post_attention_layernorm-to-mlp-down_proj"
    assert not torch.equal(model(tokens()).logits, causal_base()(tokens()).logits)


@pytest.mark.parametrize("scope", SCOPES)
def test_every_scope_routes_blocks(scope):
    model = into(
        causal_base("opt"), target_modules=None, target_blocks=["fc1->fc2"], router_scope=scope
    )
    routing = model(tokens(), output_expert_routing=True).expert_routing
    assert len(routing) == (1 if scope == "model" else 2)
    with pytest.raises(ValueError, match=r"target_blocks.*before router_layer=1"):
        _sites(causal_base(), target_blocks=["mlp"], router_scope="model", router_layer=1)


def test_a_classifier_takes_blocks():
    model = into(
        classifier_base("llama"),
        target_modules=None,
        target_blocks=["mlp"],
        expert_activation="relu",
    )
    assert model(tokens()).logits.shape == (2, 3)


@pytest.mark.parametrize(
    "name, block, reason",
    [
        ("llama", "self_attn", "layers.0.self_attn.*gives a tuple"),
        ("llama", "embed_tokens", "no tensor of hidden states"),
        ("llama", "layers.1", "layers.1.*a whole decoder layer"),
        ("llama", "act_fn", "has no weights"),
        ("llama", "mlpp", "no module of LlamaForCausalLM.*Nearest names: mlp"),
        ("llama", "down_proj", "a Linear, which is a linear: name it in target_modules"),
        ("opt", "fc1->fc3", "no 'model.decoder.layers.0.fc3' beside it"),
        ("opt", "fc2->fc1", "not called once and one after the other"),
        ("llama", "mlp->mlp.down_proj", "not two modules of one decoder layer"),
        ("llama", "model.layers.0.mlp->model.layers.1.mlp", "not two modules of one decoder layer"),
        ("mamba", "mixer->mixer.dt_proj", "not two modules"),
        ("mamba", "norm->mixer.dt_proj", "its forward is not called"),
    ],
)
def test_what_cannot_be_a_block_is_refused_with_the_reason(name, block, reason):
    refused(ValueError, reason, base=causal_base(name), target_modules=None, target_blocks=[block])


def test_in_series_a_block_that_reads_ids_is_a_place_too():
    model = into(
        causal_base(),
        target_modules=None,
        target_blocks=["embed_tokens"],
        expert_placement="series",
    )
    refused(ValueError, "gives a tuple", target_blocks=["self_attn"], expert_placement="series")
    assert not torch.equal(model(tokens()).logits, causal_base()(tokens()).logits)


def test_layers_without_the_block_are_named():
    refused(ValueError, r"in layers \[5\]", target_blocks=["mlp"], layers_to_transform=[5])


@pytest.mark.parametrize("scope", ["layer", "model"])
def test_a_block_outside_of_the_layers_has_no_router_of_a_layer(scope):
    refused(
        ValueError,
        f"target_blocks names 'model.norm'.*outside of the decoder layers.*{scope}",
        target_blocks=["model.norm"],
        router_scope=scope,
    )
    model = into(causal_base(), target_modules=None, target_blocks=["model.norm"])
    assert list(model.moelora.outside.sites) == ["model-norm"]
    model(tokens())


def test_a_linear_is_told_where_blocks_go():
    refused(ValueError, "a LlamaMLP.*target_blocks", target_modules=["mlp"])
