"""A checkpoint gives back the same model, bit for bit, from every way in which it can be saved and
loaded.
"""

import shutil

import pytest
import safetensors.torch
import torch
from bases import CLASSIFIERS, VOCAB, causal_base
from checkpoint.stored import WEIGHTS, load, logits, mixture_on, same, saved, write_base
from core.mixtures import ALL_CAUSAL, LEVELS, SCOPES, own_parameters, tokens
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoTokenizer,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
)

import moelora.injection.sites
from moelora import MoeLoraConfig, MoeLoraForCausalLM


@pytest.mark.parametrize("name", ALL_CAUSAL)
def test_reloaded_logits_are_the_same_bits(tmp_path, name):
    model = mixture_on(write_base(tmp_path / "base", name))
    model.save_pretrained(tmp_path / "experts")
    assert same(load(tmp_path / "experts"), model)


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_reloaded_classifier_and_its_trained_head_are_the_same_bits(tmp_path, name):
    model = mixture_on(write_base(tmp_path / "base", name, classifier=True), classifier=True)
    head = [p for n, p in model.named_parameters() if p.requires_grad and not model.moelora.owns(n)]
    assert head
    with torch.no_grad():
        for parameter in head:
            parameter += 0.5
    # A head that the user froze after training it is still what was trained.
    model.requires_grad_(False)
    model.save_pretrained(tmp_path / "experts")
    assert same(load(tmp_path / "experts", classifier=True), model)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("scope", SCOPES)
def test_every_scope_and_level_comes_back(tmp_path, scope, level):
    model = saved(tmp_path, router_scope=scope, routing_level=level, r=[1, 2, 3, 4])
    again = load(tmp_path / "experts")
    assert same(again, model)
    assert (again.moelora_config.router_scope, again.moelora_config.routing_level) == (scope, level)


def test_a_learned_pooling_of_several_routers_comes_back(tmp_path):
    fields = {"routing_level": "sequence", "router_pooling": "attention"}
    model = saved(tmp_path, router_scope="layer", r=[2, 3, 4, 5], **fields)
    assert same(load(tmp_path / "experts"), model)


def test_the_default_checkpoint_holds_no_base_and_is_a_moelora_config(tmp_path):
    model = saved(tmp_path)
    folder = tmp_path / "experts"
    assert all(map(model.moelora.owns, safetensors.torch.load_file(folder / WEIGHTS)))
    assert sorted(p.name for p in folder.iterdir()) == [
        "README.md",
        "config.json",
        "generation_config.json",
        WEIGHTS,
        "modeling_moelora.py",
    ]
    config = AutoConfig.from_pretrained(folder)
    assert isinstance(config, MoeLoraConfig) and config.model_type == "moelora"
    assert config.base_model_name_or_path == str(tmp_path / "its-base")
    assert config.sites == model.moelora_config.sites
    # What others may read of a new file, they may read of the weights.
    assert len({p.stat().st_mode for p in folder.iterdir()}) == 1


def test_a_self_contained_checkpoint_moves_away_from_its_base(tmp_path):
    model = mixture_on(write_base(tmp_path / "base"))
    model.save_pretrained(tmp_path / "whole", save_base=True)
    assert same(model, mixture_on(write_base(tmp_path / "base"))), (
        "saving the base changed the model"
    )
    shutil.rmtree(tmp_path / "base")
    shutil.move(tmp_path / "whole", tmp_path / "elsewhere")
    assert same(load(tmp_path / "elsewhere"), model)


def test_a_base_path_is_kept_absolute(tmp_path, monkeypatch):
    write_base(tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    model = mixture_on("base")
    model.save_pretrained("experts")
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path / "other")
    assert same(load(tmp_path / "experts"), model)


def test_saving_a_self_contained_checkpoint_again_keeps_its_base(tmp_path):
    model = mixture_on(causal_base())
    model.save_pretrained(tmp_path / "whole", save_base=True)
    again = load(tmp_path / "whole")
    again.save_pretrained(tmp_path / "whole")
    assert same(load(tmp_path / "whole"), model)


@pytest.mark.parametrize("save_base", [False, True])
def test_saving_over_a_checkpoint_keeps_the_base_inside_which_others_use(tmp_path, save_base):
    folder = tmp_path / "whole"
    first = mixture_on(causal_base())
    first.save_pretrained(folder, save_base=True)
    load(folder).save_pretrained(tmp_path / "refers-to-its-base")
    model = mixture_on(causal_base(seed=7))
    model.save_pretrained(folder, save_base=save_base)
    assert same(load(folder, **({} if save_base else {"base": causal_base(seed=7)})), model)
    assert same(load(tmp_path / "refers-to-its-base"), first)
    assert len(list(folder.glob("base-*"))) == 1 + save_base


def test_frozen_experts_do_not_change_the_file(tmp_path):
    model = saved(tmp_path)
    model.freeze_experts(["expert_1", "expert_3"])
    model.save_pretrained(tmp_path / "frozen")
    for key, tensor in safetensors.torch.load_file(tmp_path / "experts" / WEIGHTS).items():
        assert torch.equal(
            safetensors.torch.load_file(tmp_path / "frozen" / WEIGHTS)[key], tensor
        ), key
    assert same(load(tmp_path / "frozen"), model)


def test_load_keywords_reach_the_base(tmp_path):
    saved(tmp_path)
    folder = tmp_path / "experts"
    model = load(
        folder,
        attn_implementation="eager",
        dtype=torch.bfloat16,
        device_map="cpu",
        output_hidden_states=True,
    )
    assert model.config._attn_implementation == "eager"
    assert model.model.embed_tokens.weight.dtype == torch.bfloat16
    assert model.config.output_hidden_states
    assert load(folder).config._attn_implementation != "eager"
    assert load(folder, output_attentions=True).config.output_attentions
    assert {p.dtype for p in own_parameters(model).values()} == {torch.float32}
    assert logits(model).dtype == torch.bfloat16


@pytest.mark.parametrize("through_auto", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_dtype_at_saving_is_the_dtype_at_loading(tmp_path, dtype, through_auto):
    write_base(tmp_path / "base")
    model = MoeLoraForCausalLM.from_base(tmp_path / "base", MoeLoraConfig(), dtype=dtype).eval()
    model.save_pretrained(tmp_path / "experts")
    again = (load if through_auto else MoeLoraForCausalLM.from_pretrained)(tmp_path / "experts")
    assert again.dtype == dtype
    assert same(again, model)


@pytest.mark.parametrize("through_auto", [True, False])
def test_settings_that_leave_the_tensors_alone_can_change_at_loading(tmp_path, through_auto):
    model = saved(tmp_path)
    loader = load if through_auto else MoeLoraForCausalLM.from_pretrained
    again = loader(tmp_path / "experts", num_experts_per_tok=1, router_aux_loss_coef=0.5)
    model.save_pretrained(tmp_path / "unchanged")
    assert (
        again.moelora_config.num_experts_per_tok == 1
        and again.moelora_config.router_aux_loss_coef == 0.5
    )
    assert not same(again, model)
    with pytest.raises(ValueError, match="num_experts_per_tok=9"):
        loader(tmp_path / "experts", num_experts_per_tok=9)
    with pytest.raises(ValueError, match=r"routing_level cannot be changed.*num_experts_per_tok"):
        loader(tmp_path / "experts", routing_level="sequence")


def test_another_base_can_be_given_as_folder_or_model(tmp_path):
    model = saved(tmp_path)
    shutil.move(tmp_path / "its-base", tmp_path / "moved")
    with pytest.raises(OSError, match=r"its-base.*cannot be loaded(.|\n)*Pass base="):
        load(tmp_path / "experts")
    assert same(load(tmp_path / "experts", base=str(tmp_path / "moved")), model)
    base = causal_base()
    assert load(tmp_path / "experts", base=base) is base
    assert same(base, model)
    with pytest.raises(ValueError, match=r"\['output_hidden_states'\].*loaded already"):
        load(tmp_path / "experts", base=causal_base(), output_hidden_states=True)


@pytest.mark.parametrize("fields", [{}, {"target_blocks": ["mlp", "q_proj->o_proj"]}])
def test_no_probe_runs_at_loading(fields, tmp_path, monkeypatch):
    model = saved(tmp_path, **fields)

    def fail(*args, **kwargs):
        raise AssertionError("the sites are in the checkpoint")

    monkeypatch.setattr(moelora.injection.sites, "probe", fail)
    assert same(load(tmp_path / "experts"), model)


def test_generation_settings_come_back(tmp_path):
    model = saved(tmp_path)
    model.generation_config.max_new_tokens = 7
    model.save_pretrained(tmp_path / "experts")
    assert load(tmp_path / "experts").generation_config.max_new_tokens == 7


def test_a_tokenizer_in_the_folder_is_found(tmp_path):
    saved(tmp_path)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCAB)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w1")
    tokenizer.save_pretrained(tmp_path / "experts")
    assert AutoTokenizer.from_pretrained(tmp_path / "experts")("w5 w6")["input_ids"] == [5, 6]
    load(tmp_path / "experts")


def test_the_expert_load_is_in_the_checkpoint(tmp_path):
    model = saved(tmp_path)
    model.moelora.load.previous.random_(0, 9)
    model.save_pretrained(tmp_path / "experts")
    assert torch.equal(
        load(tmp_path / "experts").moelora.load.previous, model.moelora.load.previous
    )


def test_a_config_serves_several_bases_and_a_mixture_s_config_another(tmp_path):
    config = MoeLoraConfig(num_experts=2, target_modules="all-linear")
    first = MoeLoraForCausalLM.from_base(causal_base("llama"), config)
    second = MoeLoraForCausalLM.from_base(causal_base("gpt2"), config)
    third = MoeLoraForCausalLM.from_base(causal_base("gpt2"), first.moelora_config)
    assert config.sites is None
    assert second.moelora_config.sites == third.moelora_config.sites != first.moelora_config.sites


def test_a_checkpoint_that_trainer_wrote_loads(tmp_path):
    model = mixture_on(write_base(tmp_path / "base"))
    rows = [{"input_ids": row, "labels": row} for row in tokens(4)]
    settings = TrainingArguments(
        tmp_path / "run",
        max_steps=1,
        per_device_train_batch_size=2,
        report_to=[],
        save_steps=1,
        use_cpu=True,
    )
    Trainer(model=model, args=settings, train_dataset=rows).train()
    assert same(load(tmp_path / "run" / "checkpoint-1"), model.eval())
