"""Which modules are adapted and how they are grouped: found by a probe, as PEFT finds them, with no
table.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

import moelora_kernels
import peft
import pytest
import torch
from bases import CAUSAL, CLASSIFIERS, UNHEARD_OF, causal_base, classifier_base
from core.mixtures import ALL_CAUSAL, LEVELS, SCOPES, adapted, into, tokens
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as PEFT_TARGETS

import moelora
from moelora import MoeLoraConfig
from moelora.injection.sites import find_sites

# Bases whose fp32 forward needs an operator that fake tensors lack; only real weights can be probed
# then.
NEEDS_REAL_WEIGHTS = {"mixtral"}


def _sites(base, classifier=False, **fields):
    """The sites and what could not be adapted, with all linears as targets."""
    unadapted = {}
    config = MoeLoraConfig(**{"target_modules": "all-linear", **fields})
    return find_sites(base, config, classifier, unadapted), unadapted


def _probed(name="llama", **fields):
    """A mixture whose sites were found in its own base."""
    return into(causal_base(name), probe=True, **fields)


def _first_layer(sites):
    """The sites of layer 0 by the last part of their linears' names."""
    return [[n.rpartition(".")[2] for n in site] for site in sites if ".0." in site[0]]


@pytest.mark.parametrize("name", [n for n in ALL_CAUSAL if n not in NEEDS_REAL_WEIGHTS])
def test_meta_weights_give_the_sites_of_real_ones(name):
    with torch.device("meta"):
        meta = causal_base(name)
    assert {p.device.type for p in meta.parameters()} == {"meta"}
    sites, unadapted = _sites(meta)
    assert (sites, unadapted) == _sites(causal_base(name))
    assert sites


def test_an_operator_that_cannot_be_faked_is_met_by_real_weights():
    attention = [["q_proj", "k_proj", "v_proj"], ["o_proj"]]
    for name in NEEDS_REAL_WEIGHTS:
        assert _first_layer(_sites(causal_base(name))[0]) == attention


GATED = [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]]
LAYERS = {
    "llama": GATED,
    "gemma3_text": GATED,
    "phi3": [["qkv_proj"], ["o_proj"], ["gate_up_proj"], ["down_proj"]],
    "gpt2": [["c_attn"], ["c_proj"], ["c_fc"], ["c_proj"]],
    # One tensor goes into the attention and into the MLP beside it.
    "gptj": [["k_proj", "v_proj", "q_proj", "fc_in"], ["out_proj"], ["fc_out"]],
    "falcon": [["query_key_value", "dense_h_to_4h"], ["dense"], ["dense_4h_to_h"]],
    # A weight that the base multiplies by itself is no module that is called.
    "mamba": [["in_proj"], ["x_proj"]],
}


@pytest.mark.parametrize("name", LAYERS)
def test_linears_that_read_one_tensor_are_one_site(name):
    found = _first_layer(_sites(causal_base(name))[0])
    assert sorted(map(sorted, found)) == sorted(map(sorted, LAYERS[name]))


@pytest.mark.parametrize("name", ALL_CAUSAL)
def test_projection_scope_gives_every_linear_its_own_site(name):
    shared, single = (
        _sites(causal_base(name))[0],
        _sites(causal_base(name), router_scope="projection")[0],
    )
    assert sorted(single) == sorted([linear] for site in shared for linear in site)


def test_a_module_that_is_never_called_is_refused_by_name_and_reported_under_a_shorthand():
    message = "dt_proj.*its forward is not called|dt_proj.*is incompatible"
    for named in (["dt_proj"], ["x_proj", "dt_proj"], r".*\.(x_proj|dt_proj)"):
        with pytest.raises(ValueError, match=message):
            _probed("mamba", target_modules=named)
    for shorthand in ("all-linear", None):
        model = _probed("mamba", target_modules=shorthand)
        assert set(model.moelora.unadapted) == {
            f"backbone.layers.{i}.mixer.dt_proj" for i in (0, 1)
        }
        assert not any("dt_proj" in n or "out_proj" in n for n in adapted(model))


def _peft_adapts(base, **fields):
    """The names of the modules that PEFT's own get_peft_model puts a LoRA on."""
    model = peft.get_peft_model(base, peft.LoraConfig(task_type="CAUSAL_LM", **fields))
    return {n for n, m in model.base_model.model.named_modules() if isinstance(m, BaseTunerLayer)}


WANTED = {
    "all-linear": {"target_modules": "all-linear"},
    "one name": lambda ends, names: {"target_modules": ends[-1:]},
    "two names": lambda ends, names: {"target_modules": ends[:2]},
    "full name": lambda ends, names: {"target_modules": [names[0], ends[1]]},
    "regex": lambda ends, names: {"target_modules": rf".*\.1\..*({'|'.join(ends[:2])})"},
    "one layer": lambda ends, names: {"target_modules": ends[:2], "layers_to_transform": 1},
    "list of layers": lambda ends, names: {"target_modules": ends, "layers_to_transform": [0]},
}
# PEFT's all-linear stops with an error at a module that PEFT refuses.
REFUSED_BY_PEFT = {"mamba"}


@pytest.mark.parametrize("wanted", WANTED)
@pytest.mark.parametrize(
    "name", ["llama", "gpt2", "gptj", "opt", "bloom", "falcon", "gpt_neox", "phi3"]
)
@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
def test_targets_are_the_modules_that_peft_adapts(name, wanted):
    names = [n for site in _sites(causal_base(name))[0] for n in site]
    ends = list(dict.fromkeys(n.rpartition(".")[2] for n in names))
    fields = WANTED[wanted] if isinstance(WANTED[wanted], dict) else WANTED[wanted](ends, names)
    expected = _peft_adapts(causal_base(name), **fields)
    assert expected
    assert set(adapted(_probed(name, **fields))) == expected


@pytest.mark.parametrize("name", ALL_CAUSAL)
def test_default_targets_are_the_names_in_peft_s_table_and_else_all_linears(name):
    names = PEFT_TARGETS.get(causal_base(name).config.model_type, "all-linear")
    # The names, not None: PEFT stops at a base of whose experts it would rather adapt the
    # parameters.
    by_peft = (
        {"target_modules": names}
        if name not in REFUSED_BY_PEFT
        else {"target_modules": ["in_proj", "x_proj"]}
    )
    assert set(adapted(_probed(name, target_modules=None))) == _peft_adapts(
        causal_base(name), **by_peft
    )


def test_all_linear_can_be_cut_to_some_layers():
    assert {n.split(".")[2] for n in adapted(_probed(layers_to_transform=[1]))} == {"1"}


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_a_classifier_s_head_trains_and_carries_no_experts(name):
    model = into(classifier_base(name), probe=True)
    heads = {n for n, p in model.named_parameters() if p.requires_grad and "moelora" not in n}
    assert heads and not {n.rpartition(".")[0] for n in heads} & set(adapted(model))


def _outside():
    """A base with two linears outside of its decoder layers, and their names."""
    return causal_base("opt", word_embed_proj_dim=16), {"project_in", "project_out"}


@pytest.mark.parametrize("scope", SCOPES)
def test_modules_outside_of_the_layers(scope):
    base, outside = _outside()
    sites, unadapted = _sites(base, router_scope=scope)
    found = {n.rpartition(".")[2] for site in sites for n in site}
    if scope in ("site", "projection"):
        assert outside <= found and not unadapted
        into(base, probe=True, router_scope=scope)(tokens())
        return
    assert not outside & found
    assert {n.rpartition(".")[2] for n in unadapted} == outside
    with pytest.raises(ValueError, match=f"project_in.*outside of the decoder layers.*{scope}"):
        _sites(base, router_scope=scope, target_modules=["q_proj", "project_in"])


@pytest.mark.parametrize("level", LEVELS)
def test_model_scope_has_experts_in_its_router_s_layer_and_after(level):
    model = _probed(router_scope="model", router_layer=1, routing_level=level)
    assert {n.split(".")[2] for n in adapted(model)} == {"1"}
    assert {n.split(".")[2] for n in model.moelora.unadapted} == {"0"}
    assert list(model.moelora.routers) == ["model-layers-1"]
    read = []
    model.model.layers[0].register_forward_hook(lambda m, a, out: read.append(out))
    routing = model(tokens(2, 4), output_expert_routing=True).expert_routing[0]
    h = read[0].mean(1) if level == "sequence" else read[0].reshape(8, -1)
    torch.testing.assert_close(routing.logits, h @ model.moelora.routers["model-layers-1"].weight.T)
    with pytest.raises(ValueError, match="before router_layer=1"):
        _probed(router_scope="model", router_layer=1, target_modules=r".*layers\.0\..*q_proj")


@pytest.mark.parametrize("name", ["llama", "gpt2", "mamba", "mixtral"])
def test_the_probe_changes_nothing(name):
    base = causal_base(name)
    base.train()
    base.get_submodule(next(n for n, _ in base.named_modules() if n.endswith(".1"))).eval()
    for _, module in base.named_modules():
        for key, buffer in list(module._buffers.items()):
            if buffer is not None and buffer.is_floating_point():
                module._buffers[key] = buffer + 0.125
    before = {n: (id(b), b.clone()) for n, b in base.named_buffers()}
    flags = {n: m.training for n, m in base.named_modules()}
    hooks = _hooks(base)
    random = torch.get_rng_state()
    _sites(base)
    assert torch.equal(torch.get_rng_state(), random)
    assert {n: m.training for n, m in base.named_modules()} == flags
    assert {n: id(b) for n, b in base.named_buffers()} == {n: i for n, (i, _) in before.items()}
    assert all(torch.equal(b, before[n][1]) for n, b in base.named_buffers())
    assert _hooks(base) == hooks


def _hooks(model):
    return {n: (len(m._forward_hooks), len(m._forward_pre_hooks)) for n, m in model.named_modules()}


def _named_in(source: str, words: set[str]) -> set[str]:
    """Which of `words` the code names, its docstrings and comments (citations) left out."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(
            node
        ):
            node.body[0] = ast.Pass()
    code = ast.unparse(tree)
    return {w for w in words if re.search(rf"\b(?i:{w})(?![a-z0-9_])", code)}


def test_nothing_names_an_architecture():
    words = {*CAUSAL, *CLASSIFIERS, *UNHEARD_OF}
    words |= {type(causal_base(n).config).__name__.removesuffix("Config") for n in ALL_CAUSAL}
    words |= {type(classifier_base(n).config).__name__.removesuffix("Config") for n in CLASSIFIERS}
    folders = [Path(package.__file__).parent for package in (moelora, moelora_kernels)]
    sources = [path for folder in folders for path in folder.rglob("*.py")]
    named = {p.name: _named_in(p.read_text(encoding="utf-8"), words) for p in sources}
    assert len(named) > 10
    assert not {file: found for file, found in named.items() if found}
    # The search itself: in strings, in names, in the beginning of a class's name, but not in prose.
    guilty = "def f(kind):\n    'For Bloom.'\n"
    guilty += "    return kind == 'gpt2' or GPTJModel or opt.bert  # falcon"
    assert {w.lower() for w in _named_in(guilty, words)} == {"gpt2", "gptj", "opt", "bert"}
