"""State dicts of others, tied weights, transformers' own argument names, and the base without its
mixture.
"""

import pytest
import safetensors.torch
import torch
from bases import causal_base, classifier_base
from checkpoint.stored import WEIGHTS, contents, load, logits, mixture_on, same, saved, write_base
from core.mixtures import own_parameters
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from moelora import MoeLoraForCausalLM
from moelora.checkpoint.save import as_base
from moelora.checkpoint.state import differences, fingerprint, layout


def _state(model):
    return {k: t.detach().clone() for k, t in nn.Module.state_dict(model).items()}


def test_a_state_dict_gathered_elsewhere_is_saved_with_or_without_the_base_s_keys(tmp_path):
    model = mixture_on(write_base(tmp_path / "base"))
    gathered = _state(model)
    expected = logits(model)
    with torch.no_grad():
        for parameter in own_parameters(model).values():
            parameter.zero_()
    own = {key: tensor for key, tensor in gathered.items() if model.moelora.owns(key)}
    assert 0 < len(own) < len(gathered)
    for name, state in (("whole", gathered), ("own", own), ("merged", model.moelora.merged(own))):
        model.save_pretrained(tmp_path / name, state_dict=state)
        assert torch.equal(logits(load(tmp_path / name)), expected), name


def test_a_state_dict_that_does_not_fit_is_refused_before_anything_is_written(tmp_path):
    model = saved(tmp_path)
    before = contents(tmp_path / "experts")
    key = next(iter(layout(model)))
    state = _state(model)
    for wrong, said in (
        ({k: t for k, t in state.items() if k != key}, f"{key} is missing"),
        (state | {key: state[key][:1]}, f"{key} is .*, expected"),
        (state | {key: state[key].to("meta")}, f"{key} is offloaded"),
    ):
        with pytest.raises(ValueError, match=said):
            model.save_pretrained(tmp_path / "experts", state_dict=wrong)
    assert contents(tmp_path / "experts") == before


def test_a_frozen_mixture_s_state_dict_raw_or_merged_is_saved_and_loaded(tmp_path):
    model = mixture_on(write_base(tmp_path / "base"))
    model.freeze_experts(["expert_1"])
    raw = _state(model)
    expected = logits(model)
    merged = model.moelora.merged(raw)
    thawed = mixture_on(causal_base())
    assert layout(model).keys() == layout(thawed).keys() <= merged.keys()
    for state in (raw, merged):
        with torch.no_grad():
            for parameter in own_parameters(model).values():
                parameter.zero_()
        model.load_state_dict(state)
        assert torch.equal(logits(model), expected)
    model.save_pretrained(tmp_path / "experts", state_dict=raw)
    assert torch.equal(logits(load(tmp_path / "experts")), expected)
    thawed.load_state_dict(safetensors.torch.load_file(tmp_path / "experts" / WEIGHTS))
    assert torch.equal(logits(thawed), expected)


@pytest.mark.parametrize("names", [["embed_tokens", "lm_head"], ["lm_head"], ["embed_tokens"]])
def test_trained_tied_weights_are_saved_once_and_come_back_tied(tmp_path, names):
    folder = write_base(tmp_path / "base", tie_word_embeddings=True)
    model = mixture_on(folder, modules_to_save=names)
    tied = model.get_input_embeddings().weight
    assert tied is model.get_output_embeddings().weight and tied.requires_grad
    with torch.no_grad():
        tied += torch.randn_like(tied)
    model.save_pretrained(tmp_path / "experts")
    held = safetensors.torch.load_file(tmp_path / "experts" / WEIGHTS)
    keys = [key for key in held if not model.moelora.owns(key)]
    assert keys == ["model.embed_tokens.weight"]
    again = load(tmp_path / "experts")
    assert again.get_input_embeddings().weight is again.get_output_embeddings().weight
    assert torch.equal(again.get_input_embeddings().weight, tied) and same(again, model)
    model.save_pretrained(tmp_path / "whole", save_base=True)
    assert same(load(tmp_path / "whole"), model)


@pytest.mark.parametrize("through_auto", [True, False])
def test_torch_dtype_is_dtype_and_both_must_agree(tmp_path, through_auto):
    saved(tmp_path)
    loader = load if through_auto else MoeLoraForCausalLM.from_pretrained
    folder = tmp_path / "experts"
    half = torch.bfloat16
    for given in ({"torch_dtype": half}, {"dtype": half}, {"torch_dtype": "bfloat16"}):
        assert loader(folder, **given).dtype == half, given
    assert loader(folder, torch_dtype=half, dtype="bfloat16").dtype == half
    assert loader(folder, torch_dtype="auto").dtype == torch.float32
    with pytest.raises(ValueError, match="two names of one thing"):
        loader(folder, torch_dtype=half, dtype=torch.float32)


def test_transformers_own_argument_names_work(tmp_path):
    model = mixture_on(write_base(tmp_path / "base"))
    model.save_pretrained(save_directory=tmp_path / "experts")
    for loader in (MoeLoraForCausalLM, AutoModelForCausalLM):
        again = loader.from_pretrained(pretrained_model_name_or_path=tmp_path / "experts")
        assert same(again, model)
        again, info = loader.from_pretrained(tmp_path / "experts", output_loading_info=True)
        assert same(again, model)
        _, expected = AutoModelForCausalLM.from_pretrained(
            tmp_path / "base", output_loading_info=True
        )
        assert info == expected
        given = {"base": causal_base(), "output_loading_info": True}
        _, info = loader.from_pretrained(tmp_path / "experts", **given)
        assert info.keys() == expected.keys() and not any(info.values())


@pytest.mark.parametrize("fails", [False, True])
def test_as_base_takes_the_mixture_out_wherever_it_sits_and_puts_it_back(fails):
    model = mixture_on(classifier_base(), classifier=True)
    # Sites belong to their decoder layers; what stands after them keeps its place.
    assert any(
        ".moelora.sites." in name
        for name, _ in model.bert.encoder.layer.named_modules(prefix="layer")
    )
    model.bert.encoder.layer[0].add_module("after", nn.Identity())
    before = [name for name, _ in model.named_modules()]
    state = _state(model)
    settings = dict(model.config.__dict__)
    try:
        with as_base(model) as base:
            assert type(base) is type(classifier_base())
            keys = set(nn.Module.state_dict(base))
            assert keys == set(nn.Module.state_dict(classifier_base()))
            if fails:
                raise RuntimeError
    except RuntimeError:
        assert fails
    assert [name for name, _ in model.named_modules()] == before
    assert model.config.__dict__ == settings
    assert all(torch.equal(state[k], t) for k, t in nn.Module.state_dict(model).items())


def test_the_base_inside_a_checkpoint_is_the_base_s_own(tmp_path):
    model = mixture_on(causal_base())
    model.save_pretrained(tmp_path / "whole", save_base=True)
    causal_base().save_pretrained(tmp_path / "base")
    (inside,) = (tmp_path / "whole").glob("base-*")
    ours = contents(inside)
    theirs = contents(tmp_path / "base")
    assert ours == theirs


def test_weights_on_the_meta_device_have_a_fingerprint_of_shapes_alone(tmp_path):
    base = causal_base()
    print_ = fingerprint(base, ())
    meta = causal_base().to("meta")
    assert differences(print_, meta, ()) == []
    assert fingerprint(meta, ())["sample"] == {}
    assert differences(fingerprint(meta, ()), base, ()) == []


def test_the_layout_is_what_the_file_holds(tmp_path):
    model = saved(tmp_path)
    held = safetensors.torch.load_file(tmp_path / "experts" / WEIGHTS)
    planned = layout(model)
    assert {k: (t.shape, t.dtype) for k, t in held.items()} == {
        k: (t.shape, t.dtype) for k, t in planned.items()
    }
    assert all(tensor.is_meta for tensor in planned.values())
    assert isinstance(model, PreTrainedModel)
