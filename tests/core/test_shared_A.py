"""share_lora_A: the mixture whose experts all have one A, computed, trained, frozen and saved."""

from __future__ import annotations

import accelerate
import pytest
import torch
from adapters.peft_folders import save_adapter
from bases import causal_base
from core.mixtures import LEVELS, SCOPES, activate, adapted, causal, own_parameters, tokens
from peft import PeftModel
from safetensors.torch import load_file
from training.runs import NO_LOSSES, assert_bits, assert_same, batch, bits, gradients, gradients_of

from moelora import MoeLoraConfig, MoeLoraForCausalLM, resume_optimizer
from moelora.training.fitting import only_training

SHARED = {"share_lora_A": True}
NAMES = [f"expert_{e}" for e in range(4)]
HALF = {"expert_0": 0.5, "expert_2": -0.25}


def shared(**fields):
    """A mixture whose experts share A."""
    return causal(**SHARED, **fields)


@torch.no_grad()
def twin_of(model, **fields):
    """The same mixture with a copy of A for each expert."""
    twin = causal(**fields)
    for router, own in zip(twin.moelora.router_list, model.moelora.router_list, strict=True):
        router.load_state_dict(own.state_dict())
    for expert in range(model.moelora.num_experts):
        for linear, own in model.moelora.expert(expert).items():
            copy = twin.moelora.expert(expert)[linear]
            copy.A.copy_(own.A)
            copy.B.copy_(own.B)
    return twin


def summed(model, found):
    """The gradients of a twin, those of its copies of A added up."""
    lora_As = {f"{site.path}.lora_A.weight": site for site in model.moelora.sites.values()}
    return {
        name: gradient.view(len(lora_As[name].names), 4, -1, gradient.shape[1]).sum(1).flatten(0, 1)
        if name in lora_As
        else gradient
        for name, gradient in found.items()
    }


@torch.no_grad()
def logits(model, experts=None, ids=None):
    """Logits, of `experts` where there are some."""
    ids = tokens() if ids is None else ids
    if experts is None:
        return model.eval()(ids).logits
    with model.use_experts(experts):
        return model.eval()(ids).logits


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("scope", SCOPES)
def test_logits_and_gradients_are_those_of_equal_copies(scope, level):
    fields = {"router_scope": scope, "routing_level": level}
    model = shared(**fields)
    twin = twin_of(model, **fields)
    expected = summed(twin, gradients(twin, **batch()))
    # In fp32 four gradients are added in another order, and small ones are left of large ones.
    assert_same(gradients(model, **batch()), expected, 5e-5)
    for experts in (None, "expert_1", HALF):
        torch.testing.assert_close(logits(model, experts), logits(twin, experts))
    # Token by token, where eager has a way of its own.
    ids = tokens(1, 3)
    torch.testing.assert_close(logits(model, ids=ids[:, :1]), logits(twin, ids=ids[:, :1]))
    generated = model.generate(ids, max_new_tokens=4, do_sample=False)
    assert torch.equal(generated, twin.generate(ids, max_new_tokens=4, do_sample=False))


def test_the_rows_are_there_once_in_the_model_and_in_its_checkpoint(tmp_path):
    model = shared(router_scope="layer")
    for site in model.moelora.sites.values():
        assert site.lora_A.weight.shape == (3 * len(site.names), site.in_features)
        assert all(lora_B.weight.shape[0] == 12 for lora_B in site.lora_B)
    model.freeze_experts("expert_1")
    model.save_pretrained(tmp_path)
    own = {n: t for n, t in load_file(tmp_path / "model.safetensors").items() if "lora_A" in n}
    assert sum(t.numel() for t in own.values()) == sum(
        3 * site.in_features for site, _ in adapted(model).values()
    )
    again = MoeLoraForCausalLM.from_pretrained(str(tmp_path), base=causal_base())
    assert again.moelora_config.share_lora_A
    assert torch.equal(logits(again), logits(model))
    assert all(p.requires_grad for p in own_parameters(again).values())
    with pytest.raises(ValueError, match="share_lora_A cannot be changed"):
        MoeLoraForCausalLM.from_pretrained(str(tmp_path), base=causal_base(), share_lora_A=False)
    # A state dict in the merged form loads whatever is frozen.
    free = shared(router_scope="layer")
    activate(free, seed=9)
    state = model.moelora.merged(model.state_dict())
    free.load_state_dict(state)
    assert torch.equal(logits(free), logits(model))
    activate(model, seed=9)
    model.load_state_dict(state)
    assert torch.equal(logits(free), logits(model))


def test_an_expert_is_a_peft_adapter_and_a_weighting_a_merge(tmp_path):
    model = shared()
    for name in NAMES[:2]:
        model.export_expert(name, tmp_path / name)
        peft = PeftModel.from_pretrained(causal_base(), tmp_path / name).eval()
        torch.testing.assert_close(logits(model, name), peft(tokens()).logits)
    files = [load_file(tmp_path / name / "adapter_model.safetensors") for name in NAMES[:2]]
    assert all(torch.equal(files[0][n], files[1][n]) for n in files[0] if "lora_A" in n)
    expected = logits(model, HALF)
    report = model.export_merged(HALF, tmp_path / "merged")
    assert set(report.ranks.values()) == {3}, "experts with one A are one LoRA of its rank"
    peft = PeftModel.from_pretrained(causal_base(), tmp_path / "merged").eval()
    torch.testing.assert_close(peft(tokens()).logits, expected, rtol=1e-4, atol=1e-5)
    merged = model.merge_and_unload(HALF)
    torch.testing.assert_close(merged(tokens()).logits, expected, rtol=1e-4, atol=1e-5)


def _step(model, optimizer=None):
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = optimizer or torch.optim.AdamW(trained, lr=0.01, weight_decay=0.1)
    model.train()(**batch()).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return optimizer


def test_while_an_expert_is_frozen_so_is_what_it_shares():
    model = shared()
    before = {name: logits(model, name) for name in NAMES}
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
    resume_optimizer(optimizer, model.freeze_experts(["expert_1", "expert_3"]))
    kept = [site.lora_A.frozen_weight for site in model.moelora.sites.values()]
    _step(model, optimizer)
    for name in NAMES:
        assert torch.equal(logits(model, name), before[name]) == (name in ("expert_1", "expert_3"))
    resume_optimizer(optimizer, model.unfreeze_experts("expert_3"))
    assert all(
        site.lora_A.frozen_weight is own for site, own in zip(model.moelora.sites.values(), kept)
    )
    resume_optimizer(optimizer, model.unfreeze_experts("expert_1"))
    frozen = logits(model, "expert_1")
    _step(model, optimizer)
    assert all(p.requires_grad and p in optimizer.state for p in own_parameters(model).values())
    assert not torch.equal(logits(model, "expert_1"), frozen)


def test_training_one_expert_alone_trains_its_B():
    model = shared()
    before = {name: logits(model, name) for name in NAMES}
    state = bits(model)
    with only_training(model, "expert_2", routers=False):
        trained = [name for name, p in own_parameters(model).items() if p.requires_grad]
        assert trained and not any("lora_A" in name for name in trained)
        _step(model)
    changed = [name for name in NAMES if not torch.equal(logits(model, name), before[name])]
    assert changed == ["expert_2"]
    assert all(p.requires_grad for p in own_parameters(model).values())
    after = bits(model)
    assert all(torch.equal(after[n], state[n]) for n in state if "lora_A" in n)


def test_experts_come_and_go_and_the_shared_rows_stay():
    model = shared()
    optimizer = _step(model)
    lora_A = next(iter(model.moelora.sites.values())).lora_A
    rows, state = lora_A.weight.detach().clone(), optimizer.state[lora_A.weight]["exp_avg"].clone()
    before = {name: logits(model, name) for name in NAMES}
    changes = [
        model.add_expert("fresh", lora_alpha=3, seed=1),
        model.add_expert("copy", copy_of="expert_1", noise=0.1, seed=1),
        model.remove_expert("expert_0"),
        model.replace_expert("expert_3"),
    ]
    resume_optimizer(optimizer, *changes)
    lora_A = next(iter(model.moelora.sites.values())).lora_A
    assert torch.equal(lora_A.weight, rows)
    assert torch.equal(optimizer.state[lora_A.weight]["exp_avg"], state)
    for name in ("expert_1", "expert_2"):
        torch.testing.assert_close(logits(model, name), before[name])
    plain = causal_base()(tokens()).logits
    assert torch.equal(logits(model, "fresh"), plain)
    assert torch.equal(logits(model, "expert_3"), plain)
    assert not torch.allclose(logits(model, "copy"), before["expert_1"])
    _step(model, optimizer)
    model.freeze_experts("copy")
    model.remove_expert("copy")
    assert all(p.requires_grad for p in own_parameters(model).values())
    _step(model)


def test_an_adapter_joins_where_it_has_the_same_A(tmp_path):
    model = shared()
    model.export_expert("expert_1", tmp_path / "own")
    model.add_expert("again", adapter=tmp_path / "own")
    torch.testing.assert_close(logits(model, "again"), logits(model, "expert_1"))
    state = bits(model)
    other = save_adapter(tmp_path / "other", r=3, target_modules=["q_proj"])
    short = shared(target_modules=["q_proj"])
    for own, folder in ((model, other), (short, other), (model, save_adapter(tmp_path / "r", r=2))):
        with pytest.raises(ValueError, match="not the one that all experts share.*export_expert"):
            own.add_expert("law", adapter=folder)
    with pytest.raises(ValueError, match=r"r=5, and the experts share an A of rank 3"):
        model.add_expert("law", r=5)
    assert_bits(bits(model), state)


def test_adapters_with_one_A_make_such_a_mixture_and_others_do_not(tmp_path):
    model = shared()
    folders = {name: tmp_path / name for name in NAMES}
    for name, folder in folders.items():
        model.export_expert(name, folder)
    config = MoeLoraConfig(num_experts=4, **SHARED)
    again = MoeLoraForCausalLM.from_adapters(causal_base(), folders, config)
    for experts in (*NAMES, HALF):
        torch.testing.assert_close(logits(again, experts), logits(model, experts))
    assert len(own_parameters(again)) == len(own_parameters(model))
    folders["expert_3"] = save_adapter(tmp_path / "x", r=3, target_modules="all-linear", seed=5)
    with pytest.raises(ValueError, match="'expert_3' has another A of .* than 'expert_0'"):
        MoeLoraForCausalLM.from_adapters(causal_base(), folders, config)
    folders["expert_3"] = save_adapter(tmp_path / "y", r=4, target_modules="all-linear")
    with pytest.raises(ValueError, match=r"ranks in r are .* Give all one rank"):
        MoeLoraForCausalLM.from_adapters(causal_base(), folders, config)


@pytest.mark.parametrize(
    "fields", [{"r": [2, 3]}, {"expert_ranks": {"q_proj": [0, 16]}}], ids=["r", "expert_ranks"]
)
def test_experts_of_other_ranks_cannot_share(fields):
    with pytest.raises(ValueError, match="share_lora_A=True and the ranks in .* Give all one rank"):
        MoeLoraConfig(num_experts=2, **SHARED, **fields)
    equal = {"r": [3, 3], "expert_ranks": {"q_proj": [2, 2]}, "lora_alpha": [1, 2]}
    assert MoeLoraConfig(num_experts=2, **SHARED, **equal).share_lora_A


def test_a_linear_with_a_rank_of_its_own_and_experts_with_scalings():
    linear = "model.layers.0.self_attn.q_proj"
    fields = {"lora_alpha": [1, 2, 3, 4], "expert_ranks": {linear: [5, 5, 5, 5]}}
    model = shared(**fields)
    torch.testing.assert_close(logits(model), logits(twin_of(model, **fields)))
    model.add_expert("law")
    assert model.moelora.expert(4)[linear].A.shape[0] == 5
    assert model.moelora_config.scaling_of(linear)[4] == 1 / 5
    none = shared(expert_ranks={linear: [0, 0, 0, 0]})
    none.add_expert("law")
    assert none.moelora.expert(4)[linear].A.shape[0] == 0
    none.train()(**batch()).loss.backward()


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_layers_have_the_same_gradients(reentrant):
    model = shared(lora_dropout=0.1)
    expected = gradients(model, **batch())
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert_same(gradients(model, **batch()), expected, 1e-6)


def test_compiled_it_has_the_same_gradients_in_one_graph():
    torch._dynamo.reset()
    model = shared(target_modules=["q_proj", "v_proj"], **NO_LOSSES).train()
    expected = gradients(model, window=None, **batch())
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    model.zero_grad()
    compiled(**batch()).loss.backward()
    assert_same(gradients_of(model), expected, 1e-4)


def test_offloaded_it_has_the_same_logits():
    model = shared()
    model.freeze_experts("expert_1")
    expected = logits(model)
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    assert torch.equal(logits(model), expected)
    with pytest.raises(ValueError, match="while it is offloaded"):
        model.freeze_experts("expert_0")
