"""What of a base gets no experts is reported with the true reason, or refused by name."""

from __future__ import annotations

import pytest
import torch
from bases import causal_base
from transformers import (
    AutoModelForSeq2SeqLM,
    BartConfig,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    T5Config,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

from moelora import MoeLoraConfig, MoeLoraForCausalLM
from moelora.injection import left_out

SMALL = dict(num_experts=4, r=4)
IMAGE = 60
VISION = dict(depth=2, embed_dim=32, hidden_size=32, num_heads=4, mlp_ratio=2, patch_size=4)
TEXT = dict(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=64,
    rope_scaling={"type": "mrope", "mrope_section": [1, 1, 2]},
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
)


def encoder_decoders():
    """One of each kind: relative positions, learned ones, and audio in."""
    heads = dict(encoder_attention_heads=2, decoder_attention_heads=2)
    layers = dict(d_model=32, encoder_layers=2, decoder_layers=2, vocab_size=99, **heads)
    t5 = T5Config(d_model=32, d_ff=64, num_layers=2, num_heads=2, d_kv=16, vocab_size=99)
    start = dict(pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1)
    return [
        AutoModelForSeq2SeqLM.from_config(t5),
        AutoModelForSeq2SeqLM.from_config(BartConfig(**layers)),
        WhisperForConditionalGeneration(WhisperConfig(**layers, **start)),
    ]


def test_encoder_decoders_are_refused_by_name():
    for base in encoder_decoders():
        before = type(base)
        with pytest.raises(ValueError, match=f"{before.__name__} is an encoder-decoder"):
            MoeLoraForCausalLM.from_base(base, MoeLoraConfig(**SMALL))
        assert type(base) is before


@pytest.fixture
def warnings_of_moelora(monkeypatch):
    """What was said to the user."""
    said = []
    monkeypatch.setattr(left_out.logger, "warning", said.append)
    return said


@pytest.mark.parametrize("targets", ["all-linear", None])
def test_fused_experts_of_the_base_are_listed_and_said(targets, warnings_of_moelora):
    base = causal_base("mixtral")
    fused = {n: p.numel() for n, p in base.named_parameters() if ".experts." in n}
    share = sum(fused.values()) / sum(p.numel() for p in base.parameters())
    model = MoeLoraForCausalLM.from_base(base, MoeLoraConfig(**SMALL, target_modules=targets))
    assert fused.keys() <= model.moelora.unadapted.keys()
    (line,) = warnings_of_moelora
    assert f"{share:.0%} of the parameters of this MixtralForCausalLM" in line


def test_a_base_without_fused_experts_says_nothing(warnings_of_moelora):
    for name in ("llama", "mamba", "gpt2"):
        MoeLoraForCausalLM.from_base(causal_base(name), MoeLoraConfig(**SMALL))
    assert not warnings_of_moelora


def test_each_named_target_matches_something(warnings_of_moelora):
    """`gate_proj` of older versions is fused now: beside q_proj it was left out without a word."""
    config = MoeLoraConfig(**SMALL, target_modules=["q_proj", "gate_proj"])
    with pytest.raises(ValueError, match=r"'gate_proj', which matches no module.*experts\.gate_up"):
        MoeLoraForCausalLM.from_base(causal_base("mixtral"), config)
    with pytest.raises(ValueError, match=r"'q_prj'.*Nearest names: q_proj"):
        wrong = MoeLoraConfig(**SMALL, target_modules=["q_prj", "v_proj"])
        MoeLoraForCausalLM.from_base(causal_base(), wrong)
    whole = ["model.layers.0.self_attn.q_proj", "layers.1.mlp.up_proj"]
    model = MoeLoraForCausalLM.from_base(
        causal_base(), MoeLoraConfig(**SMALL, target_modules=whole)
    )
    assert len(model.moelora.linears()) == 2
    assert not warnings_of_moelora


def vision_language() -> Qwen2VLForConditionalGeneration:
    """A tiny one whose image is four tokens."""
    torch.manual_seed(0)
    vision = dict(**VISION, spatial_merge_size=2, temporal_patch_size=2, in_channels=3)
    ids = dict(image_token_id=IMAGE, video_token_id=61, vision_start_token_id=62)
    config = Qwen2VLConfig(
        text_config=TEXT, vision_config=vision, vision_end_token_id=63, vocab_size=64, **ids
    )
    return Qwen2VLForConditionalGeneration(config).eval()


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_a_vision_language_base_is_adapted_where_text_goes(level):
    ids = torch.tensor([[1, 62, IMAGE, IMAGE, IMAGE, IMAGE, 63, 5, 6, 7]])
    image = dict(
        pixel_values=torch.randn(16, 3 * 2 * 4 * 4),
        image_grid_thw=torch.tensor([[1, 4, 4]]),
        mm_token_type_ids=(ids == IMAGE).long(),
    )
    config = MoeLoraConfig(**SMALL, target_modules="all-linear", routing_level=level)
    model = MoeLoraForCausalLM.from_base(vision_language(), config).eval()
    plain = vision_language()
    assert torch.equal(model(ids, **image).logits, plain(ids, **image).logits)
    new = dict(max_new_tokens=4, do_sample=False)
    assert torch.equal(model.generate(ids, **image, **new), plain.generate(ids, **image, **new))
    vision = {name: why for name, why in model.moelora.unadapted.items() if ".visual." in name}
    assert set(vision.values()) == {"a forward pass of text does not reach model.visual"}
    assert len(vision) + len(model.moelora.unadapted.keys() - vision.keys()) >= 8
    model.train()
    labels = ids.masked_fill(torch.arange(10) < 7, -100)
    model(ids, **image, labels=labels).loss.backward()
    grads = [f.get_parameter("weight").grad for f in model.moelora.factors()]
    assert all(grad is not None and bool(grad.isfinite().all()) for grad in grads)
