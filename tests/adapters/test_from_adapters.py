"""One model from PEFT adapters: each expert is its adapter, a weighting their weighted sum, bad
sets change nothing.
"""

from __future__ import annotations

import pytest
import torch
from adapters.peft_folders import (
    ATTENTION,
    BASES,
    base_of,
    mixed_adapters,
    peft_logits,
    peft_model,
    save_adapter,
)
from core.mixtures import factors, own_parameters, tokens
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file

from moelora import MoeLoraForCausalLM, MoeLoraForSequenceClassification

IDS = tokens()


def compose(base, adapters, config=None, **options):
    """`from_adapters` of the class that fits the base, in eval mode."""
    public = MoeLoraForCausalLM
    if (base if isinstance(base, str) else base.config.model_type) == "bert":
        public = MoeLoraForSequenceClassification
    return public.from_adapters(
        base_of(base) if isinstance(base, str) else base, adapters, config, **options
    ).eval()


def difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """The largest difference relative to the largest value."""
    return float((ours - theirs).detach().abs().max() / theirs.detach().abs().max())


@torch.no_grad()
def logits(model, experts=None):
    """The model's logits, with `experts` forced."""
    if experts is None:
        return model(input_ids=IDS).logits
    with model.use_experts(experts):
        return model(input_ids=IDS).logits


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """The four mixed adapters of each base, made once."""
    return {base: mixed_adapters(tmp_path_factory.mktemp(base), base) for base in BASES}


@pytest.mark.parametrize("base", BASES)
def test_a_forced_expert_is_its_peft_adapter(mixed, base):
    model = compose(base, mixed[base])
    plain = logits(base_of(base))
    ranks = {
        r
        for name in model.moelora_config.target_modules
        for r in model.moelora_config.ranks_of(name)
    }
    assert ranks == {0, 2, 4, 5, 8, 16, 32}
    for name, folder in mixed[base].items():
        theirs = peft_logits(base, folder, IDS)
        assert difference(logits(model, name), theirs) < 1e-5
        assert difference(theirs, plain) > 1e-3


@pytest.mark.parametrize("base", BASES)
def test_a_fixed_weighting_adds_the_weighted_products(mixed, base):
    """y = (W + Σ w s B A) x with PEFT's own delta of each adapter."""
    weights = dict(zip(mixed[base], (0.5, 0.25, -0.75, 1.5)))
    merged = base_of(base)
    for name, weight in weights.items():
        peft = PeftModel.from_pretrained(base_of(base), mixed[base][name])
        for module, layer in peft.get_base_model().named_modules():
            if hasattr(layer, "get_delta_weight"):
                merged.get_submodule(module).weight.data += weight * layer.get_delta_weight(
                    "default"
                )
    assert difference(logits(compose(base, mixed[base]), weights), logits(merged)) < 1e-5


@pytest.mark.parametrize("base", ["llama", "gpt2"])
def test_every_bit_arrives_and_everything_trains(mixed, base):
    model = compose(base, mixed[base])
    for expert, folder in enumerate(mixed[base].values()):
        stored = load_file(f"{folder}/adapter_model.safetensors")
        for name, (A, B) in factors(model, expert).items():
            prefix = f"base_model.model.{name}.lora_"
            assert A.shape[0] == stored.get(f"{prefix}A.weight", torch.empty(0)).shape[0]
            if len(A):
                assert torch.equal(A, stored[f"{prefix}A.weight"])
                assert torch.equal(B, stored[f"{prefix}B.weight"])
    assert all(p.requires_grad for p in own_parameters(model).values())
    assert not any(
        p.requires_grad for n, p in model.named_parameters() if not model.moelora.owns(n)
    )
    model.train()(IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None for p in own_parameters(model).values() if p.numel())


def test_half_precision_adapters_keep_their_bits(tmp_path):
    folder = tmp_path / "half"
    peft_model("llama").to(torch.bfloat16).save_pretrained(folder)
    stored = load_file(folder / "adapter_model.safetensors")
    found = factors(compose("llama", {"half": folder}), 0)
    for name, (A, B) in found.items():
        for part, ours in (("A", A), ("B", B)):
            theirs = stored[f"base_model.model.{name}.lora_{part}.weight"]
            assert ours.dtype == torch.float32 and theirs.dtype == torch.bfloat16
            assert torch.equal(ours.to(torch.bfloat16), theirs)


def test_one_adapter_alone_and_a_checkpoint_of_it(tmp_path):
    folder = save_adapter(tmp_path / "adapter", r=3, lora_alpha=7)
    model = compose("llama", {"only": folder})
    config = model.moelora_config
    assert (config.num_experts, config.num_experts_per_tok, config.r, config.lora_alpha) == (
        1,
        1,
        3,
        7,
    )
    assert config.expert_ranks is None and config.expert_scaling is None
    model.save_pretrained(tmp_path / "mixture")
    again = MoeLoraForCausalLM.from_pretrained(tmp_path / "mixture", base=base_of("llama"))
    assert torch.equal(logits(again, "only"), logits(model, "only"))


def test_a_live_peft_model_is_a_source_and_so_is_one_of_its_adapters(tmp_path):
    first, second = (save_adapter(tmp_path / str(seed), seed=seed, r=seed + 3) for seed in (1, 2))
    live = PeftModel.from_pretrained(base_of("llama"), first)
    theirs = logits(live.eval())
    model = compose("llama", {"live": live})
    assert difference(logits(model, "live"), theirs) < 1e-5
    live.load_adapter(second, "other")
    model = compose("llama", {"a": (live, "default"), "b": (live, "other")})
    assert difference(logits(model, "b"), peft_logits("llama", second, IDS)) < 1e-5
    with pytest.raises(ValueError, match="one of: default, other"):
        compose("llama", {"live": live})


def test_a_scaling_set_by_hand_on_a_live_adapter_counts():
    live = peft_model("llama")
    for layer in live.modules():
        if hasattr(layer, "set_scale"):
            layer.set_scale("default", 0.3)
    assert difference(logits(compose("llama", {"live": live}), "live"), logits(live)) < 1e-5


def test_an_adapter_of_a_converted_pissa_start_is_a_plain_delta(tmp_path):
    config = LoraConfig(r=4, target_modules=ATTENTION["llama"], init_lora_weights="pissa")
    live = get_peft_model(base_of("llama"), config)
    live.peft_config["default"].init_lora_weights = True
    live.save_pretrained(tmp_path / "start")
    live.peft_config["default"].init_lora_weights = "pissa"
    generator = torch.Generator().manual_seed(5)
    for name, parameter in live.named_parameters():
        if ".lora_" in name:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    trained = logits(live.eval())
    live.save_pretrained(
        tmp_path / "converted", path_initial_model_for_weight_conversion=str(tmp_path / "start")
    )
    model = compose("llama", {"pissa": tmp_path / "converted"})
    assert difference(logits(model, "pissa"), trained) < 1e-5
    live.save_pretrained(tmp_path / "raw")
    with pytest.raises(ValueError, match="path_initial_model_for_weight_conversion"):
        compose("llama", {"pissa": tmp_path / "raw"})
