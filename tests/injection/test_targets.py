"""What cannot be adapted is an error that says which module and why; the base stays as it was."""

import peft
import pytest
import torch
from bases import causal_base, classifier_base
from core.mixtures import FIELDS, causal, classifier, tokens
from transformers import LlamaModel

from moelora import MoeLoraConfig, MoeLoraForCausalLM, MoeLoraForSequenceClassification


def refused(error, match, base=None, public=MoeLoraForCausalLM, **fields):
    """`from_base` raises, and the base answers, trains and looks as before."""
    base = causal_base() if base is None else base
    before = type(base), list(base.state_dict()), [p.requires_grad for p in base.parameters()]
    said = base(tokens()).logits if hasattr(base, "lm_head") else None
    with pytest.raises(error, match=match):
        public.from_base(base, MoeLoraConfig(**{**FIELDS, **fields}))
    assert (
        type(base),
        list(base.state_dict()),
        [p.requires_grad for p in base.parameters()],
    ) == before
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in base.modules())
    assert said is None or torch.equal(base(tokens()).logits, said)


def test_nothing_matched_shows_the_nearest_names_and_all_linears():
    refused(
        ValueError,
        r"'q_prj'.*LlamaForCausalLM.*Nearest names: [^.]*q_proj.*down_proj",
        target_modules=["q_prj"],
    )
    refused(ValueError, "matches no module", target_modules=r"model\.layers\.7\..*")
    refused(ValueError, r"in layers \[5\] matches no module", layers_to_transform=[5])
    refused(
        ValueError, r"Nearest names: [^.]*c_attn", base=causal_base("gpt2"), target_modules=["atn"]
    )


@pytest.mark.parametrize(
    "targets, kind",
    [
        (["embed_tokens"], "Embedding"),
        (["q_proj", "input_layernorm"], "LlamaRMSNorm"),
        (["mlp"], "LlamaMLP"),
        (r".*\.self_attn", "LlamaAttention"),
    ],
)
def test_a_target_that_is_no_linear_is_named_with_its_kind(targets, kind):
    refused(
        ValueError,
        f"{targets[-1] if isinstance(targets, list) else 'self_attn'}', a {kind}",
        target_modules=targets,
    )


def test_layer_norm_is_no_linear():
    refused(ValueError, "ln_1', a LayerNorm", base=causal_base("gpt2"), target_modules=["ln_1"])


def test_a_named_target_that_is_never_called_is_an_error():
    refused(
        ValueError,
        "x_proj.*cannot be adapted|dt_proj",
        base=causal_base("mamba"),
        target_modules=["in_proj", "dt_proj"],
    )


def test_targets_outside_of_what_the_scope_routes_are_errors():
    refused(
        ValueError,
        "lm_head.*router_scope='layer'",
        target_modules=["q_proj", "lm_head"],
        router_scope="layer",
    )
    refused(
        ValueError,
        r"layers\.0\..*router_layer=1",
        target_modules=["q_proj"],
        router_scope="model",
        router_layer=1,
    )
    with pytest.raises(ValueError):
        causal(router_scope="model", router_layer=7)


def test_modules_to_save_that_match_nothing_are_an_error():
    refused(
        ValueError, r"modules_to_save names 'lm_heat'.*model, lm_head", modules_to_save=["lm_heat"]
    )


def test_a_model_that_holds_a_mixture_takes_no_second_one():
    model = causal()
    said = model(tokens()).logits
    with pytest.raises(ValueError, match=r"holds a mixture already.*unload"):
        MoeLoraForCausalLM.from_base(model, MoeLoraConfig())
    assert torch.equal(model(tokens()).logits, said)
    base = model.unload()
    assert torch.equal(
        MoeLoraForCausalLM.from_base(base, MoeLoraConfig()).eval()(tokens()).logits,
        causal_base()(tokens()).logits,
    )


def test_a_checkpoint_folder_is_no_base(tmp_path):
    causal().save_pretrained(tmp_path, save_base=True)
    with pytest.raises(ValueError, match="holds a mixture already"):
        MoeLoraForCausalLM.from_base(tmp_path, MoeLoraConfig())


def test_a_peft_model_is_no_base():
    wrapped = peft.get_peft_model(causal_base(), peft.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(TypeError, match=r"PeftModel.*merge_and_unload"):
        MoeLoraForCausalLM.from_base(wrapped, MoeLoraConfig())
    with pytest.raises(ValueError, match="PEFT adapters inside"):
        MoeLoraForCausalLM.from_base(wrapped.base_model.model, MoeLoraConfig())
    MoeLoraForCausalLM.from_base(wrapped.unload(), MoeLoraConfig())


@pytest.mark.parametrize("wrong", [None, 3, MoeLoraConfig(), torch.nn.Linear(2, 2)])
def test_something_else_is_no_base(wrong):
    with pytest.raises(TypeError, match="expected a hub id, a folder or a PreTrainedModel"):
        MoeLoraForCausalLM.from_base(wrong, MoeLoraConfig())


@pytest.mark.parametrize("wrong", [{"num_experts": 4}, peft.LoraConfig(), "top_k"])
def test_the_config_is_a_moelora_config(wrong):
    with pytest.raises(TypeError, match="expected a MoeLoraConfig"):
        MoeLoraForCausalLM.from_base(causal_base(), wrong)


def test_a_path_to_nowhere_is_named(tmp_path):
    with pytest.raises((OSError, ValueError), match="nowhere"):
        MoeLoraForCausalLM.from_base(tmp_path / "nowhere", MoeLoraConfig(), local_files_only=True)


def test_keywords_beside_a_loaded_model_are_refused():
    with pytest.raises(ValueError, match=r"\['attn_implementation', 'dtype'\].*loaded already"):
        MoeLoraForCausalLM.from_base(
            causal_base(), MoeLoraConfig(), dtype="bfloat16", attn_implementation="eager"
        )


def test_each_class_takes_its_own_kind_of_base():
    refused(TypeError, "use MoeLoraForSequenceClassification", base=classifier_base())
    refused(TypeError, "use MoeLoraForSequenceClassification", base=classifier_base("llama"))
    refused(
        TypeError,
        "not a sequence classifier.*MoeLoraForCausalLM",
        public=MoeLoraForSequenceClassification,
    )
    refused(
        TypeError,
        "does not have a language modelling head",
        base=LlamaModel(causal_base().config).eval(),
    )
    assert classifier().is_classifier and not causal().is_classifier


def test_a_config_changed_by_hand_is_checked_again():
    config = MoeLoraConfig()
    config.num_experts_per_tok = 9
    with pytest.raises(ValueError, match="num_experts_per_tok=9"):
        MoeLoraForCausalLM.from_base(causal_base(), config)
