"""One adapter split into experts: weights that stand for all of it give PEFT's own logits."""

from __future__ import annotations

import pytest
import torch
from adapters.peft_folders import base_of, edit_tensors, peft_logits, peft_model, save_adapter
from bases import causal_base
from core.mixtures import own_parameters, tokens
from safetensors.torch import load_file

from moelora import MoeLoraConfig, MoeLoraForCausalLM, MoeLoraForSequenceClassification
from moelora.adapters.reading import read_adapter
from moelora.adapters.splitting import split_adapter

IDS = tokens()
# Ranks of 8, 5 and 2 times E directions, that do not all divide; scalings of their own.
ADAPTER = {
    "r": 8,
    "lora_alpha": 12,
    "target_modules": "all-linear",
    "rank_pattern": {"down_proj": 5},
    "alpha_pattern": {"up_proj": 3},
}
QUARTERS = {f"expert_{e}": 0.25 for e in range(4)}


def split(adapter, method, base="llama", experts=4, options=(), **fields):
    """The mixture of one adapter's parts, in eval mode."""
    public = MoeLoraForSequenceClassification if base == "bert" else MoeLoraForCausalLM
    config = MoeLoraConfig(num_experts=experts, **fields)
    own = dict(options)
    return public.from_adapters(base_of(base), adapter, config, split=method, **own).eval()


@torch.no_grad()
def logits(model, experts=None):
    """The logits, of `experts` where there are some."""
    if experts is None:
        return model(input_ids=IDS).logits
    with model.use_experts(experts):
        return model(input_ids=IDS).logits


def assert_near(ours, theirs):
    """Equal to rounding."""
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4 * float(theirs.abs().max()))


@pytest.mark.parametrize("base", ["llama", "gpt2", "bert"])
@pytest.mark.parametrize("method", ["copy", "svd"])
def test_equal_weights_give_peft_s_logits(method, base, tmp_path):
    folder = save_adapter(tmp_path / "a", base, r=6, lora_alpha=9, use_rslora=base == "gpt2")
    theirs = peft_logits(base, folder, IDS)
    assert float((logits(base_of(base)) - theirs).abs().max() / theirs.abs().max()) > 0.05
    assert_near(logits(split(folder, method, base), QUARTERS), theirs)


@pytest.mark.parametrize("noise", [None, 0.0, 0.3])
def test_copies_are_the_adapter_under_any_weights_that_sum_to_1(noise, tmp_path):
    folder = save_adapter(tmp_path / "a", **ADAPTER)
    theirs = peft_logits("llama", folder, IDS)
    model = split(folder, "copy", options={"noise": noise, "seed": 1})
    # Also under its own routers, which are random, token by token.
    for experts in ("expert_3", {"expert_0": 1.5, "expert_2": -0.5}, QUARTERS, None):
        assert_near(logits(model, experts), theirs)
    assert model.moelora_config.expert_ranks and model.moelora_config.r == 8
    for linear, first in model.moelora.expert(0).items():
        A, B = read_adapter(folder).factors(linear)
        other = model.moelora.expert(1)[linear]
        assert torch.equal(first.A, A) == torch.equal(first.A, other.A) == (noise == 0)
        assert torch.equal(first.B, B.T) == torch.equal(first.B, other.B) == (noise == 0)
        change = float((first.A - A).norm() / A.norm())
        expected = 0.01 if noise is None else noise
        assert 0.5 * expected <= change <= 2 * expected
    twin = own_parameters(split(folder, "copy", options={"noise": noise, "seed": 1}))
    assert all(torch.equal(p, twin[n]) for n, p in own_parameters(model).items() if ".lora_" in n)


def test_copies_do_not_stay_alike_though_the_routers_weigh_them_alike(tmp_path):
    folder = save_adapter(tmp_path / "a", r=4)
    losses = {"router_aux_loss_coef": 0.0, "router_z_loss_coef": 0.0}
    for noise in (0.0, 0.1):
        model = split(folder, "copy", num_experts_per_tok=4, options={"noise": noise}, **losses)
        with torch.no_grad():
            for router in model.moelora.router_list:
                router.weight.zero_()
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        model.train()(IDS, labels=IDS).loss.backward()
        optimizer.step()
        model.eval()
        same = torch.allclose(logits(model, "expert_0"), logits(model, "expert_1"), atol=1e-5)
        assert same == (noise == 0)


def test_the_directions_are_dealt_out_in_turns(tmp_path):
    folder = save_adapter(tmp_path / "a", **ADAPTER)
    model = split(folder, "svd")
    adapter = read_adapter(folder)
    assert_near(logits(model, QUARTERS), peft_logits("llama", folder, IDS))
    for linear, target in adapter.targets.items():
        A, B = (factor.double() for factor in adapter.factors(linear))
        U, S, Vh = torch.linalg.svd(B @ A)
        ranks = []
        for expert in range(4):
            own = model.moelora.expert(expert)[linear]
            mine = list(range(expert, target.r, 4))
            ranks.append(len(own.A))
            assert len(own.A) == len(mine) and own.scaling == 4 * target.scaling
            expected = U[:, mine] * S[mine] @ Vh[mine]
            product = own.B.T.double() @ own.A.double()
            torch.testing.assert_close(product, expected, atol=1e-5, rtol=0)
        assert sum(ranks) == target.r and max(ranks) - min(ranks) <= 1
    assert model.moelora_config.lora_alpha == 12 and model.moelora_config.r == 2
    model.train()(IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None for p in own_parameters(model).values())


def test_directions_without_a_singular_value_can_still_learn(tmp_path):
    """B = 0, as after no training at all: no factor of an expert may be 0 in both."""
    folder = save_adapter(tmp_path / "a", r=4, target_modules=["q_proj"])
    edit_tensors(folder, layers_0_self_attn_q_proj_lora_B=torch.zeros_like)
    model = split(folder, "svd")
    for expert in range(4):
        own = model.moelora.expert(expert)["model.layers.0.self_attn.q_proj"]
        assert own.A.norm() > 0.1 and not own.B.any()
    edit_tensors(folder, layers_0_self_attn_q_proj_lora_A=torch.zeros_like)
    assert split(folder, "svd").moelora.expert(0)["model.layers.0.self_attn.q_proj"].A.any()
    wide = save_adapter(tmp_path / "wide", r=40, lora_alpha=3, target_modules=["k_proj"])
    assert_near(logits(split(wide, "svd"), QUARTERS), peft_logits("llama", wide, IDS))


def test_a_live_adapter_in_16_bits_and_a_checkpoint_of_its_parts(tmp_path):
    live = peft_model("llama", r=4).to(torch.bfloat16)
    model = split(live, "svd", num_experts_per_tok=4)
    assert {p.dtype for n, p in own_parameters(model).items() if ".lora_" in n} == {torch.float32}
    live.save_pretrained(tmp_path / "a")
    assert_near(logits(model, QUARTERS), peft_logits("llama", str(tmp_path / "a"), IDS))
    model.save_pretrained(tmp_path / "mixture")
    again = MoeLoraForCausalLM.from_pretrained(str(tmp_path / "mixture"), base=causal_base())
    assert torch.equal(logits(again), logits(model))
    model.export_merged(QUARTERS, tmp_path / "merged")
    assert_near(peft_logits("llama", str(tmp_path / "merged"), IDS), logits(model, QUARTERS))


def test_parts_join_other_experts(tmp_path):
    folder = save_adapter(tmp_path / "a", r=4)
    parts = split_adapter(folder, ["one", "two"], "svd")
    assert parts["one"].nbytes == read_adapter(folder).nbytes // 2
    other = {"law": save_adapter(tmp_path / "b", r=3, seed=2)}
    model = MoeLoraForCausalLM.from_adapters(causal_base(), {**parts, **other})
    assert_near(logits(model, {"one": 0.5, "two": 0.5}), peft_logits("llama", folder, IDS))
    assert_near(logits(model, "law"), peft_logits("llama", other["law"], IDS))
    model.add_expert("again", adapter=parts["two"])
    assert_near(logits(model, "again"), logits(model, "two"))


def test_copies_that_share_A(tmp_path):
    folder = save_adapter(tmp_path / "a", r=4)
    exact = {"options": {"noise": 0.0}, "share_lora_A": True}
    model = split(folder, "copy", **exact)
    assert_near(logits(model), peft_logits("llama", folder, IDS))
    assert all(len(s.lora_A.weight) == 4 * len(s.names) for s in model.moelora.sites.values())
    stored = load_file(f"{folder}/adapter_model.safetensors")
    first = next(iter(model.moelora.expert(3)))
    assert torch.equal(
        model.moelora.expert(3)[first].A, stored[f"base_model.model.{first}.lora_A.weight"]
    )


REFUSED = {
    "split='halves' is unknown.*copy, svd": {"split": "halves"},
    r"q_proj has 3 for 4 experts.*at most 3, or split='copy'": {"split": "svd"},
    "are for split='copy', not 'svd'": {"split": "svd", "seed": 1},
    "are for split='copy': leave": {"noise": 0.1},
    "noise=-1": {"split": "copy", "noise": -1.0},
    "noise=0.0, or leave share_lora_A out": {"split": "copy", "share_lora_A": True},
    "an A of its own.*noise=0.0": {"split": "svd", "share_lora_A": True},
    "config.r=5, but the adapters make it 3": {"split": "copy", "r": 5},
    "cannot become experts": {"split": "copy", "adapter": "dora"},
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_cannot_be_is_refused(message, tmp_path):
    options = dict(REFUSED[message])
    config = {n: options.pop(n) for n in ("share_lora_A", "r") if n in options}
    kind = {"use_dora": True} if options.pop("adapter", None) else {}
    folder = save_adapter(tmp_path / "a", r=3, **kind)
    base = causal_base()
    with pytest.raises(ValueError, match=message):
        adapters = folder if "split" in options else {f"expert_{e}": folder for e in range(4)}
        own = MoeLoraConfig(num_experts=4, **config)
        MoeLoraForCausalLM.from_adapters(base, adapters, own, **options)
    assert not hasattr(base, "moelora")
    with pytest.raises(TypeError, match="pass its folder, hub id or PeftModel alone"):
        MoeLoraForCausalLM.from_adapters(base, {"a": folder}, split="copy")
