"""Experts are kept in use by the balancing bias, and where they are not, words say so."""

from __future__ import annotations

import logging

import pytest
import torch
from bases import causal_base
from core.mixtures import causal, into, tokens
from training.runs import NO_LOSSES, batch, random_batches, rows_of, step, trainer

from moelora import MoeLoraConfig
from moelora.core.collapse import collapse_in_words
from moelora.training import MoeLoraCallback


def peak_load(seed: int, rate: float) -> float:
    """The worst router's largest load over the mean one, in the last 20 of 200 steps."""
    base = causal_base(seed=seed, num_hidden_layers=1)
    fields = {"num_experts": 8, "router_bias_update_rate": rate, **NO_LOSSES}
    model = into(base, active=False, **fields).train()
    model.moelora.counts_load = True
    generator = torch.Generator().manual_seed(seed)
    for router in model.moelora.router_list:
        # Sure of itself from the beginning, and so not balanced.
        std = 2 * router.in_features**-0.5
        torch.nn.init.normal_(router.weight, std=std, generator=generator)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3)
    counts = []
    for inputs in random_batches(200, rows=8, length=16, seed=seed):
        step(model, optimizer, **inputs)
        counts.append(model.moelora.load.current.clone())
    load = torch.stack(counts[-20:]).sum(0).double()
    return float((load.max(1).values / load.mean(1)).max())


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_bias_keeps_the_load_even(seed):
    assert peak_load(seed, rate=0.01) <= 1.5


def test_without_it_the_load_is_uneven():
    assert peak_load(0, rate=0.0) > 1.5


CONFIG = MoeLoraConfig(num_experts=4)
NAMES = ["one", "two"]


def words(*shares: list[float], in_use: int = 2, config: MoeLoraConfig = CONFIG) -> str:
    return collapse_in_words(torch.tensor(shares), in_use, config, NAMES)


def test_even_and_uneven_loads_are_no_collapse():
    assert words([0.25, 0.25, 0.25, 0.25], [0.4, 0.4, 0.1, 0.1]) == ""
    # All that a row needs are in use, and more than half of the others.
    config = MoeLoraConfig(num_experts=6)
    assert words([0.3, 0.3, 0.15, 0.15, 0.1, 0.0], config=config) == ""


def test_collapse_is_said_with_names_numbers_and_what_to_change():
    said = words([0.25, 0.25, 0.25, 0.25], [0.49, 0.01, 0.01, 0.49])
    for part in (
        "router of two has collapsed: 2 of its 4 experts get less than 10% of an even share",
        "(expert_1, expert_2), and expert_0 gets 49% of all slots",
        "1 of 2 routers",
        "raise router_aux_loss_coef (it is 0.01)",
        "set router_bias_update_rate",
        "noisy_top_k",
    ):
        assert part in said
    config = MoeLoraConfig(num_experts=4, router="threshold", router_aux_loss_coef=0.0)
    said = words([0.97, 0.01, 0.01, 0.01], [0.25] * 4, in_use=1, config=config)
    assert "router of one" in said and "expert_0 gets 97%" in said and "it is 0)" in said
    # Not what this router refuses.
    assert "bias" not in said
    config = MoeLoraConfig(num_experts=2, num_experts_per_tok=1, null_expert=True)
    said = words([0.01, 0.01, 0.98], [0.3, 0.3, 0.4], in_use=1, config=config)
    assert "2 of its 2 experts" in said and "(base) gets 98%" in said


def collapsed(**fields):
    """A mixture one of whose routers always chooses the first two experts."""
    model = causal(router_bias_update_rate=1e-9, **fields)
    model.moelora.load.bias[3, :2] = 10.0
    return model


class Heard(logging.Handler):
    def __init__(self):
        super().__init__()
        self.messages: list[str] = []

    def emit(self, record):
        self.messages.append(record.getMessage())


@pytest.fixture
def heard():
    log = logging.getLogger("transformers.moelora")
    handler = Heard()
    level = log.level
    log.addHandler(handler)
    log.setLevel(logging.WARNING)
    yield handler.messages
    log.removeHandler(handler)
    log.setLevel(level)


@pytest.mark.parametrize("losses", [{}, NO_LOSSES])
def test_the_callback_warns_once(heard, losses, tmp_path):
    model = collapsed(**losses)
    run = trainer(model, rows_of(batch(16)), tmp_path, [MoeLoraCallback()], max_steps=12)
    run.train()
    (message,) = heard
    assert f"router of {model.moelora.router_names[3]} has collapsed: 2 of its 4" in message
    assert not model.moelora.counts_load


def test_the_callback_is_quiet_where_all_is_well_or_experts_are_banned(heard, tmp_path):
    model = causal(router_scope="layer", **NO_LOSSES)
    data = rows_of(batch(16))
    run = trainer(model, data, tmp_path, [MoeLoraCallback()], max_steps=8, learning_rate=1e-5)
    run.train()
    assert "expert_peak_load" in run.state.log_history[0]
    model = causal()
    with model.use_experts(ban=["expert_1", "expert_2"]):
        trainer(model, data, tmp_path, [MoeLoraCallback()], max_steps=8).train()
    assert heard == []


def test_a_report_says_it_too():
    model = collapsed()
    assert (
        f"router of {model.moelora.router_names[3]}"
        in model.route(input_ids=tokens(8, 12)).collapse()
    )
    with model.use_experts("expert_0"):
        assert model.route(input_ids=tokens(8, 12)).collapse() == ""
    # Of a few tokens nothing can be said.
    assert model.route(input_ids=tokens(1, 4)).collapse() == ""
    assert causal().route(input_ids=tokens(8, 12)).collapse() == ""
    assert causal(router="soft").route(input_ids=tokens(8, 12)).collapse() == ""
