"""Experts come and go between optimizer steps: its state moves along; routers of any form grow with
them.
"""

from __future__ import annotations

import copy
import io

import pytest
import torch
from core.mixtures import causal, tokens
from torch import nn
from training.runs import assert_bits, batch, bits

from moelora import ROUTERS, Router, register_router
from moelora.expert_pool import resume_optimizer

NAMES = [f"expert_{e}" for e in range(4)]
LINEAR = "model.layers.0.self_attn.q_proj"
BY_LINEAR = {
    "r": [2, 3, 4, 5],
    "lora_alpha": [2.0, 3.0, 8.0, 5.0],
    "expert_ranks": {LINEAR: [0, 3, 1, 2]},
    "expert_scaling": {LINEAR: [1.0, 0.5, 2.0, -1.0]},
}


def _optimizer(model):
    trains = [p for p in model.parameters() if p.requires_grad]
    matrices = [p for p in trains if p.dim() == 2]
    others = [p for p in trains if p.dim() != 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=1e-2)


def _factors(model):
    """Each expert's (A, B) by the linear's name, copied, whatever is frozen."""
    return [
        {linear: (own.A.clone(), own.B.clone()) for linear, own in model.moelora.expert(e).items()}
        for e in range(model.moelora_config.num_experts)
    ]


def _step(model, optimizer, forced=("expert_0", "expert_1", "expert_3"), **inputs):
    """One step on all but the newcomer, in the same proportions whatever experts there are."""
    optimizer.zero_grad()
    with model.use_experts(dict.fromkeys(forced, 0.5)):
        model.train()(**{**batch(), **inputs}).loss.backward()
    optimizer.step()


GROWTH = {
    "a fresh one": lambda m: [m.add_expert("law")],
    "a copy, frozen": lambda m: [m.add_expert("law", copy_of="expert_0"), m.freeze_experts("law")],
    "a removal": lambda m: [m.remove_expert("expert_2")],
    "several": lambda m: [
        m.add_expert("law"),
        m.replace_expert("law", r=7),
        m.remove_expert("expert_2"),
    ],
    "nothing in the end": lambda m: [m.freeze_experts(NAMES), m.unfreeze_experts(NAMES)],
}


@pytest.mark.parametrize("growth", GROWTH)
@pytest.mark.parametrize("fields", [{}, BY_LINEAR], ids=["alike", "mixed ranks"])
def test_the_optimizer_goes_on_as_without_the_change(growth, fields):
    model = causal(**fields)
    twin = causal(**fields)
    optimizers = [_optimizer(m) for m in (model, twin)]
    for _ in range(2):
        for m, o in zip((model, twin), optimizers):
            _step(m, o)
    changes = GROWTH[growth](model)
    if growth == "nothing in the end":
        # Frozen rows have no state, so it is only the groups that come back.
        resume_optimizer(optimizers[0], *changes)
        trains = {id(p) for p in model.parameters() if p.requires_grad}
        assert {id(p) for g in optimizers[0].param_groups for p in g["params"]} == trains
        return
    resume_optimizer(optimizers[0], *changes)
    trains = {id(p) for p in model.parameters() if p.requires_grad}
    assert {id(p) for g in optimizers[0].param_groups for p in g["params"]} == trains
    assert {id(p) for p in optimizers[0].state} <= trains
    assert [g["weight_decay"] for g in optimizers[0].param_groups] == [0.1, 0.0]
    start = _factors(model)
    for m, o in zip((model, twin), optimizers):
        _step(m, o)
    for e, name in enumerate(model.moelora_config.expert_names):
        if name == "law":
            continue
        now = _factors(model)[e]
        expected = _factors(twin)[NAMES.index(name)]
        for linear, ab in now.items():
            for a, b, old in zip(ab, expected[linear], start[e][linear]):
                torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
                assert not a.numel() or not torch.equal(a, old), "weight decay reaches everyone"


def test_state_moves_bit_for_bit_and_the_optimizer_saves_and_loads():
    model = causal(**BY_LINEAR, router_aux_loss_coef=0.5)
    optimizer = _optimizer(model)
    for seed in range(2):
        optimizer.zero_grad()
        model.train()(**batch(seed=seed)).loss.backward()
        optimizer.step()
    weights = [router.weight for router in model.moelora.routers.values()]
    state = [{k: v.clone() for k, v in optimizer.state[w].items()} for w in weights]
    frozen = model.freeze_experts("expert_2")
    resume_optimizer(optimizer, frozen, model.add_expert("law"), model.remove_expert("expert_0"))
    for router, before in zip(model.moelora.routers.values(), state):
        after = optimizer.state[router.weight]
        assert torch.equal(after["step"], before["step"])
        for name in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(after[name][:3], before[name][1:]) and not after[name][3].any()
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    again = copy.deepcopy(model)
    theirs = dict(zip((id(p) for p in model.parameters()), again.parameters()))
    groups = [{"params": [theirs[id(p)] for p in g["params"]]} for g in optimizer.param_groups]
    loaded = torch.optim.AdamW(groups)
    loaded.load_state_dict(torch.load(file, weights_only=True))
    for m, o in ((model, optimizer), (again, loaded)):
        o.zero_grad()
        m(**batch(seed=5)).loss.backward()
        o.step()
    assert_bits(bits(again), bits(model))


def test_an_optimizer_whose_state_has_no_rows_is_refused():
    model = causal()
    optimizer = torch.optim.Adafactor([p for p in model.parameters() if p.requires_grad])
    model.train()(**batch()).loss.backward()
    optimizer.step()
    before = [list(g["params"]) for g in optimizer.param_groups]
    with pytest.raises(TypeError, match="make a new optimizer"):
        resume_optimizer(optimizer, model.add_expert("law"))
    assert all(
        a is b
        for x, g in zip(before, optimizer.param_groups)
        for a, b in zip(x, g["params"], strict=True)
    )


class _Hidden(Router):
    """Two layers, the second of which keeps its experts in columns."""

    def __init__(self, config, in_features):
        super().__init__(config, in_features)
        self.down = nn.Parameter(torch.randn(6, in_features))
        self.up = nn.Parameter(torch.randn(6, config.num_experts))

    def score(self, x):
        """Logits `[N, E]`."""
        return (x @ self.down.T).tanh() @ self.up


class _Resizing(_Hidden):
    """The same with its own resize."""

    def resize(self, keep):
        """Columns move."""
        mean = self.up.detach().mean(1)
        columns = [mean if e is None else self.up.detach()[:, e] for e in keep]
        self.up = nn.Parameter(torch.stack(columns, 1))
        self.num_experts = len(keep)


@pytest.fixture
def custom():
    register_router("test_hidden")(_Hidden)
    register_router("test_resizing")(_Resizing)
    yield
    del ROUTERS["test_hidden"], ROUTERS["test_resizing"]


def test_a_router_of_another_form_says_how_it_grows(custom):
    model = causal(router="test_hidden")
    state = copy.deepcopy(bits(model))
    config = model.moelora_config.own_fields()
    with pytest.raises(ValueError, match="_Hidden cannot be resized.*down, up.*override resize"):
        model.add_expert("law")
    assert_bits(bits(model), state)
    assert model.moelora_config.own_fields() == config
    model = causal(router="test_resizing")
    optimizer = _optimizer(model)
    before = {n: r.down.detach().clone() for n, r in model.moelora.routers.items()}
    model.train()(**batch()).loss.backward()
    optimizer.step()
    averages = {
        n: optimizer.state[r.down]["exp_avg"].clone() for n, r in model.moelora.routers.items()
    }
    resume_optimizer(optimizer, model.add_expert("law", copy_of="expert_1"))
    for name, router in model.moelora.routers.items():
        assert router.up.shape == (6, 5) and torch.equal(router.up[:, 4], router.up[:, 1])
        assert torch.equal(optimizer.state[router.down]["exp_avg"], averages[name])
        assert router.down.shape == before[name].shape
    assert model.route(input_ids=tokens()).by_router.shape[1] == 5
