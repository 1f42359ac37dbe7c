"""The base that experts were trained on is recognised, and another one is an error that says what
differs.
"""

import pytest
import torch
from bases import causal_base, classifier_base
from checkpoint.stored import load, logits, mixture_on, same, saved, write_base

from moelora import MoeLoraConfig, MoeLoraForCausalLM
from moelora.checkpoint.state import differences, digest, fingerprint, tensors_to_save


def test_a_base_of_another_architecture_is_named(tmp_path):
    saved(tmp_path)
    for base in (causal_base("gpt2"), str(write_base(tmp_path / "gpt2", "gpt2"))):
        with pytest.raises(
            ValueError, match=r"is a 'gpt2' model; the experts in .* 'llama'.*LlamaForCausalLM"
        ):
            load(tmp_path / "experts", base=base)
    with pytest.raises(ValueError, match=r"is not a linear of this GPT2LMHeadModel"):
        load(tmp_path / "experts", base=causal_base("gpt2"), allow_base_mismatch=True)


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"hidden_size": 48}, r"embed_tokens\.weight is \[64, 48\], was \[64, 32\]"),
        ({"vocab_size": 80}, r"embed_tokens\.weight is \[80, 32\], was \[64, 32\]"),
        ({"num_hidden_layers": 1}, r"weights it lacks: model\.layers\.1\..*\(9 in all\)"),
        ({"num_hidden_layers": 3}, r"weights it has in addition: model\.layers\.2\..*\(9 in all\)"),
        ({"seed": 7}, r"has other values \(such as "),
    ],
)
def test_a_base_of_another_shape_or_with_other_weights_is_told_apart(tmp_path, changes, said):
    saved(tmp_path)
    base = causal_base(**changes)
    with pytest.raises(ValueError, match=said + "(.|\n)*allow_base_mismatch=True"):
        load(tmp_path / "experts", base=base)
    assert not hasattr(base, "moelora") and all(p.requires_grad for p in base.parameters())


def test_a_classifier_s_checkpoint_is_not_taken_for_a_language_model_s(tmp_path):
    model = mixture_on(write_base(tmp_path / "base", classifier=True), classifier=True)
    model.save_pretrained(tmp_path / "experts")
    with pytest.raises(ValueError, match=r"lm_head\.weight"):
        load(tmp_path / "experts")
    with pytest.raises(TypeError, match="is not a sequence classifier"):
        load(tmp_path / "experts", classifier=True, base=causal_base())


def test_a_changed_base_folder_is_noticed_and_the_override_takes_it(tmp_path):
    model = saved(tmp_path)
    write_base(tmp_path / "its-base", seed=7)
    with pytest.raises(ValueError, match="other values"):
        load(tmp_path / "experts")
    forced = load(tmp_path / "experts", allow_base_mismatch=True)
    transplanted = mixture_on(causal_base(seed=7))
    transplanted.load_state_dict(tensors_to_save(model))
    assert same(forced, transplanted)


@pytest.mark.parametrize("then", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("now", [torch.float32, torch.bfloat16, torch.float16])
def test_the_same_base_in_another_dtype_is_the_same_and_another_is_not(then, now):
    print_ = fingerprint(causal_base().to(then), ())
    assert differences(print_, causal_base().to(now), ()) == []
    assert differences(print_, causal_base(seed=7).to(now), ())


def test_experts_trained_in_bf16_load_onto_the_fp32_base(tmp_path):
    write_base(tmp_path / "base")
    model = MoeLoraForCausalLM.from_base(tmp_path / "base", MoeLoraConfig(), dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "experts")
    again = load(tmp_path / "experts", dtype=torch.float32)
    assert again.dtype == torch.float32
    assert torch.equal(logits(again), logits(causal_base()))


def test_a_few_changed_weights_in_fp32_are_enough():
    base = causal_base()
    print_ = fingerprint(base, ())
    with torch.no_grad():
        for parameter in base.parameters():
            parameter *= 1 + 1e-6
    assert differences(print_, base, ())


def test_what_training_changes_is_not_a_part_of_the_fingerprint():
    model = mixture_on(classifier_base(), classifier=True)
    before = fingerprint(model, [n for n, p in model.named_parameters() if p.requires_grad])
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 1
    assert fingerprint(model, [n for n, p in model.named_parameters() if p.requires_grad]) == before
    assert not any("moelora" in name or "classifier" in name for name in before["shapes"])


def test_the_digest_tells_bases_and_dtypes_apart():
    bases = [
        causal_base(),
        causal_base(seed=7),
        causal_base(hidden_size=48),
        causal_base().to(torch.bfloat16),
    ]
    assert len({digest(fingerprint(base, ())) for base in bases}) == len(bases)
    assert digest(fingerprint(causal_base(), ())) == digest(fingerprint(causal_base(), ()))
