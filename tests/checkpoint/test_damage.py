"""A damaged or foreign checkpoint is an error that says what is wrong; nothing is half loaded."""

import json

import pytest
import safetensors.torch
import torch
from bases import causal_base
from checkpoint.stored import WEIGHTS, contents, load, logits, mixture_on, rewrite, same, saved
from core.mixtures import own_parameters

from moelora import MoeLoraForCausalLM
from moelora.config_checks import FORMAT_VERSION

A_KEY = "model.layers.0.moelora.sites.mlp-down_proj.lora_A.weight"


def _cut(folder):
    path = folder / WEIGHTS
    path.write_bytes(path.read_bytes()[:-100])


def _cut_in_the_header(folder):
    path = folder / WEIGHTS
    path.write_bytes(path.read_bytes()[:20])


def _empty(folder):
    (folder / WEIGHTS).write_bytes(b"")


def _reshaped(folder):
    rewrite(folder, lambda held: held.update({A_KEY: held[A_KEY].T.contiguous()}))


def _missing(folder):
    rewrite(folder, lambda held: held.pop(A_KEY))


def _extra(folder):
    rewrite(folder, lambda held: held.update({"moelora.surplus": torch.zeros(1)}))


def _nan(folder):
    rewrite(folder, lambda held: held[A_KEY][1].fill_(torch.nan))


def _inf(folder):
    rewrite(folder, lambda held: held[A_KEY][0, 0].fill_(-torch.inf))


def _newer(folder):
    rewrite(folder, config={"format_version": FORMAT_VERSION + 1, "field_of_the_future": 1})


def _of_another_program(folder):
    safetensors.torch.save_file({"a": torch.zeros(1)}, folder / WEIGHTS)


def _gone(folder):
    (folder / WEIGHTS).unlink()


def _unknown_router(folder):
    rewrite(folder, config={"router": "from_elsewhere"})


def _foreign_sites(folder):
    rewrite(folder, config={"sites": [["model.layers.9.mlp.down_proj"]]})


DAMAGES = {
    _cut: "damaged or cut short",
    _cut_in_the_header: "damaged or cut short",
    _empty: "damaged or cut short",
    _reshaped: r"down_proj\.lora_A\.weight is \[48, 12\], expected \[12, 48\] \(1 in all\)",
    _missing: r"down_proj\.lora_A\.weight is missing",
    _extra: r"moelora\.surplus is unknown",
    _nan: "contains NaN or Inf",
    _inf: "contains NaN or Inf",
    _newer: f"{WEIGHTS} has format version {FORMAT_VERSION + 1}; .* {FORMAT_VERSION}: upgrade",
    _of_another_program: "not written by moelora",
    _gone: f"holds no {WEIGHTS}",
    _unknown_router: "'from_elsewhere' is not registered.*top_k",
    _foreign_sites: r"layers\.9\.mlp\.down_proj.*is not a linear of this LlamaForCausalLM",
}


def _state(model):
    """All that could change on a base: class, modules, hooks, what trains, settings."""
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    trains = [(n, p.requires_grad) for n, p in model.named_parameters()]
    return (
        type(model),
        hooks,
        trains,
        sorted(model.__dict__),
        dict(model.config.__dict__),
        model.training,
    )


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    folder = tmp_path_factory.mktemp("original")
    saved(folder, r=3, num_experts=4)
    return folder


@pytest.fixture
def folder(original, tmp_path):
    for name, data in contents(original / "experts").items():
        (tmp_path / name).write_bytes(data)
    return tmp_path


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__.strip("_"))
def test_damage_is_named_and_leaves_a_given_base_alone(folder, damage):
    load(folder)
    damage(folder)
    base = causal_base().train()
    before = _state(base)
    said = logits(base.eval())
    base.train()
    for given in ({}, {"base": base}):
        with pytest.raises(ValueError, match=DAMAGES[damage]):
            load(folder, **given)
    assert _state(base) == before and not hasattr(base, "moelora")
    assert torch.equal(logits(base.eval()), said)


@pytest.mark.parametrize("text", ["{ no json", "", '{"model_type": "moelora", "no_such_field": 1}'])
def test_a_broken_config_json_is_an_error_and_the_weights_still_load(folder, text):
    (folder / "config.json").write_text(text)
    with pytest.raises((OSError, ValueError)):
        load(folder)
    # All that is needed lies in the weights' file.
    assert torch.equal(
        logits(MoeLoraForCausalLM.from_pretrained(folder)), logits(mixture_on(causal_base()))
    )


def test_a_config_json_of_a_newer_format_says_upgrade(folder):
    fields = json.loads((folder / "config.json").read_text())
    fields |= {"format_version": FORMAT_VERSION + 1, "field_of_the_future": 1}
    (folder / "config.json").write_text(json.dumps(fields))
    with pytest.raises(ValueError, match="upgrade moelora"):
        load(folder)


def test_a_config_json_from_before_the_weights_does_not_count(folder, tmp_path):
    model = mixture_on(causal_base(), r=5, routing_level="sequence")
    older = (folder / "config.json").read_text()
    model.save_pretrained(folder)
    (folder / "config.json").write_text(older)
    assert same(load(folder, base=causal_base()), model)


def test_a_checkpoint_of_a_model_made_in_memory_asks_for_its_base(tmp_path):
    model = mixture_on(causal_base())
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"names no base.*Pass base=.*save_base=True"):
        load(tmp_path)
    assert same(load(tmp_path, base=causal_base()), model)


def test_load_state_dict_forgives_the_base_and_nothing_of_the_experts(folder):
    model = load(folder)
    held = safetensors.torch.load_file(folder / WEIGHTS)
    with torch.no_grad():
        for parameter in own_parameters(model).values():
            parameter.zero_()
    result = model.load_state_dict(held)
    assert not result.missing_keys and not result.unexpected_keys
    assert same(model, load(folder))
    for strict in (True, False):
        with pytest.raises(RuntimeError, match=f"missing \\['{A_KEY}'\\]"):
            model.load_state_dict({k: v for k, v in held.items() if k != A_KEY}, strict=strict)
        with pytest.raises(RuntimeError, match=r"unknown \['moelora\.surplus'\]"):
            model.load_state_dict({**held, "moelora.surplus": torch.zeros(1)}, strict=strict)
        with pytest.raises(RuntimeError, match="has shape"):
            model.load_state_dict({**held, A_KEY: held[A_KEY].T}, strict=strict)
    with pytest.raises(RuntimeError, match=r"lacks: \['elsewhere'\]"):
        model.load_state_dict({**held, "elsewhere": torch.zeros(1)})
    assert model.load_state_dict(
        {**held, "elsewhere": torch.zeros(1)}, strict=False
    ).unexpected_keys == ["elsewhere"]
    assert same(model, load(folder)), "a refused state dict was loaded in part"
