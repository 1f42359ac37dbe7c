"""Importing moelora teaches the Auto classes one more model type, and changes nothing for the
others.
"""

import importlib

import pytest
import torch
from bases import VOCAB, causal_base, classifier_base
from core.mixtures import LEVELS, causal, into, tokens
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedTokenizerFast,
    pipeline,
)

import moelora


@pytest.fixture
def tokenizer():
    """One word a token, w0 … ."""
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCAB)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="w0", eos_token="w2", padding_side="left"
    )


def test_the_model_type_is_known():
    assert isinstance(AutoConfig.for_model("moelora", num_experts=3), moelora.MoeLoraConfig)
    assert AutoModelForCausalLM._model_mapping[moelora.MoeLoraConfig] is moelora.MoeLoraForCausalLM
    mapping = AutoModelForSequenceClassification._model_mapping
    assert mapping[moelora.MoeLoraConfig] is moelora.MoeLoraForSequenceClassification


def test_importing_twice_is_fine():
    # As a notebook's autoreload does: the module's own lines run again.
    again = importlib.reload(moelora)
    assert AutoModelForCausalLM._model_mapping[again.MoeLoraConfig] is again.MoeLoraForCausalLM


@pytest.mark.parametrize("classifier", [False, True])
def test_ordinary_models_load_as_ever(tmp_path, classifier):
    base = classifier_base() if classifier else causal_base()
    base.save_pretrained(tmp_path)
    auto = AutoModelForSequenceClassification if classifier else AutoModelForCausalLM
    again = auto.from_pretrained(tmp_path)
    assert type(again) is type(base)
    assert torch.equal(again(tokens()).logits, base(tokens()).logits)


def test_a_config_alone_makes_no_model():
    with pytest.raises(ValueError, match=r"from_base"):
        AutoModelForCausalLM.from_config(moelora.MoeLoraConfig())


@pytest.mark.parametrize("level", LEVELS)
def test_the_text_generation_pipeline_runs(tokenizer, level):
    model = causal(routing_level=level)
    settings = dict(max_new_tokens=4, do_sample=False, return_full_text=False)
    made = pipeline("text-generation", model=model, tokenizer=tokenizer)(
        ["w5 w6 w7", "w9"], batch_size=2, **settings
    )
    ids = model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=4, do_sample=False)[0, 3:]
    assert (
        made[0][0]["generated_text"].split()
        == tokenizer.decode(ids, skip_special_tokens=True).split()
    )


def test_the_text_generation_pipeline_runs_from_a_folder(tokenizer, tmp_path):
    model = causal()
    model.save_pretrained(tmp_path, save_base=True)
    tokenizer.save_pretrained(tmp_path)
    settings = dict(max_new_tokens=4, do_sample=False)
    here = pipeline("text-generation", model=model, tokenizer=tokenizer)("w5 w6", **settings)
    assert pipeline("text-generation", model=str(tmp_path))("w5 w6", **settings) == here


def test_the_text_classification_pipeline_runs(tokenizer):
    base = classifier_base()
    expected = pipeline("text-classification", model=base, tokenizer=tokenizer)("w5 w6")
    model = into(base, active=False)
    assert pipeline("text-classification", model=model, tokenizer=tokenizer)("w5 w6") == expected


def test_a_save_between_the_configuration_and_the_weights_is_not_a_change(tmp_path):
    """The Auto class reads config.json first; keywords are compared with what it read then."""
    model = causal()
    model.save_pretrained(tmp_path, save_base=True)
    read = AutoConfig.from_pretrained(tmp_path, num_experts_per_tok=1)
    assert read.num_experts_per_tok == 1 and read.as_read.num_experts_per_tok == 2
    assert "as_read" not in read.to_dict()
    other = causal(routing_level="sequence", r=5)
    other.save_pretrained(tmp_path, save_base=True)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, config=read)
    assert again.moelora_config.num_experts_per_tok == 1
    assert again.moelora_config.routing_level == "sequence" and again.moelora_config.r == 5


def test_the_configuration_of_another_folder_is_refused(tmp_path):
    causal().save_pretrained(tmp_path / "one", save_base=True)
    causal(r=5).save_pretrained(tmp_path / "other", save_base=True)
    read = AutoConfig.from_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match=r"\br\b.* cannot be changed when loading"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "one", config=read)
