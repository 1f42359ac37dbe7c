"""Which rows are experts' is declared, never guessed: widths that agree with the number of experts
change nothing.
"""

from __future__ import annotations

from dataclasses import fields
from typing import ClassVar

import pytest
import torch
from core.mixtures import POOLING_ROUTERS, causal, suited, tokens
from torch import nn

from moelora import ROUTERS, MoeLoraConfig, Router, register_router
from moelora.routers import TopKRouter

EXPERTS = 4


# Those that keep their experts in another form have tests of their own.
BY_ROWS = [router for router in sorted(ROUTERS) if ROUTERS[router].resize is Router.resize]


def config_of(router: str, null_expert: bool, **given) -> MoeLoraConfig:
    if router not in POOLING_ROUTERS:
        return MoeLoraConfig(num_experts=EXPERTS, router=router, null_expert=null_expert, **given)
    fields = suited(
        num_experts=EXPERTS,
        router=router,
        null_expert=null_expert,
        routing_level="sequence",
        router_pooling="attention",
        **given,
    )
    return MoeLoraConfig(**fields)


def tensors(router: Router) -> dict[str, torch.Tensor]:
    return {name: t.detach().clone() for name, t in router.state_dict().items()}


@pytest.mark.parametrize("width", [EXPERTS, EXPERTS + 1, 7], ids=["experts", "choices", "other"])
@pytest.mark.parametrize(
    ("router", "null_expert"),
    [(r, n) for r in BY_ROWS for n in (False, True) if ROUTERS[r].takes_null_expert or not n],
)
def test_only_the_experts_rows_move(router, width, null_expert):
    # Every size that is free to choose (inputs, hidden units) is the number of experts or choices.
    declared = [option.name for option in fields(ROUTERS[router].Options)]
    options = {name: width for name in ("hidden_size", "context_size") if name in declared}
    config = config_of(router, null_expert, router_options=options)
    made = ROUTERS[router](config, width)
    before = tensors(made)
    made.resize([3, None, 0])
    after = tensors(made)
    rows = [3, None, 0] + [EXPERTS] * null_expert
    assert set(after) == made.expert_rows | (made.shared_parameters & set(after))
    for name, old in before.items():
        if name not in made.expert_rows:
            assert torch.equal(after[name], old), name
            continue
        assert len(after[name]) == len(rows) == made.num_choices, name
        for new_row, former in zip(after[name], rows):
            if former is not None:
                assert torch.equal(new_row, old[former]), name
            elif old.is_floating_point():
                assert torch.equal(new_row, old[[3, 0]].mean(0)), name
            else:
                assert not new_row.any(), name
    assert made.score(torch.randn(2, width)).shape == (2, len(rows))


def test_a_hidden_layer_as_wide_as_there_are_experts_stays_in_a_model():
    model = causal(num_experts=3, router="mlp", router_options={"hidden_size": 3})
    model.remove_expert("expert_1")
    for router in model.moelora.routers.values():
        assert router.hidden_weight.shape[0] == router.hidden_bias.shape[0] == 3
        assert router.weight.shape == (2, 3)
    assert bool(model(tokens()).logits.isfinite().all())


class _Hidden(Router):
    """A layer in the middle that is as wide as there are experts."""

    def __init__(self, config, in_features):
        super().__init__(config, in_features)
        self.down = nn.Parameter(torch.randn(config.num_experts, in_features))
        self.up = nn.Parameter(torch.randn(config.num_experts, config.num_experts))
        self.register_buffer("calls", torch.zeros(config.num_experts))

    def score(self, x):
        return x @ self.down.T @ self.up.T


class _Declared(_Hidden):
    expert_rows: ClassVar[frozenset[str]] = frozenset({"up"})
    shared_parameters = Router.shared_parameters | {"down", "calls"}


class _Scaled(TopKRouter):
    """Says nothing about what it adds to its parent."""

    def __init__(self, config, in_features):
        super().__init__(config, in_features)
        self.scale = nn.Parameter(torch.ones(config.num_experts))


class _Nested(Router):
    """Its rows are in a submodule."""

    expert_rows: ClassVar[frozenset[str]] = frozenset({"rows.0"})

    def __init__(self, config, in_features):
        super().__init__(config, in_features)
        self.rows = nn.ParameterList([torch.randn(config.num_experts, in_features)])

    def score(self, x):
        return x @ self.rows[0].T


def test_a_router_that_declares_nothing_is_refused_and_one_that_does_is_not():
    config = MoeLoraConfig(num_experts=4)
    for cls, names in ((_Hidden, "calls, down, up"), (_Scaled, "scale")):
        router = cls(config, 8)
        before = tensors(router)
        with pytest.raises(
            ValueError, match=f"{cls.__name__} cannot be resized.* {names}.*expert_rows"
        ):
            router.resize([0, 1, 2])
        assert router.num_experts == 4
        assert all(torch.equal(t, before[name]) for name, t in router.state_dict().items())
    router = _Declared(config, 8)
    router.resize([2, 0])
    assert router.score(torch.randn(3, 8)).shape == (3, 2)
    assert router.down.shape == (4, 8) and router.calls.shape == (4,)
    nested = _Nested(config, 8)
    nested.resize([3, None])
    assert nested.score(torch.randn(3, 8)).shape == (3, 2)


@pytest.mark.parametrize(
    ("rows", "problem"), [("weights", "does not exist"), ("down", r"\(5, 8\)")]
)
def test_wrong_declarations_are_named(rows, problem):
    class Wrong(TopKRouter):
        expert_rows = frozenset({"weight", rows})
        shared_parameters = Router.shared_parameters | {"down"}

        def __init__(self, config, in_features):
            super().__init__(config, in_features)
            self.down = nn.Parameter(torch.randn(5, in_features))

    with pytest.raises(ValueError, match=f"{rows} of expert_rows.*{problem}"):
        Wrong(MoeLoraConfig(num_experts=4), 8).resize([0])


def test_an_undeclared_router_is_refused_by_the_pool_and_nothing_changes():
    register_router("test_undeclared")(_Hidden)
    try:
        model = causal(router="test_undeclared")
        logits = model(tokens()).logits
        with pytest.raises(ValueError, match="cannot be resized"):
            model.add_expert("law")
        assert torch.equal(model(tokens()).logits, logits)
    finally:
        del ROUTERS["test_undeclared"]
