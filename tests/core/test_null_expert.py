"""The base as a choice: a router that may choose no expert."""

from __future__ import annotations

import copy

import pytest
import torch
from bases import causal_base
from core.mixtures import LEVELS, SCOPES, causal, prompt_mask, tokens
from torch import nn

from moelora import MoeLoraConfig, MoeLoraForCausalLM
from moelora.config import NO_EXPERT
from moelora.expert_pool import resume_optimizer
from moelora.routers import TopKRouter
from moelora.training.router_init import initialise

EXPERTS = 4


def null(**fields):
    return causal(null_expert=True, **fields)


@torch.no_grad()
def prefer(model, choice: int, by: float = 1e4) -> None:
    """Let every router find that choice far more probable than any other, whatever it reads."""

    def score(router, x):
        logits = x.new_zeros(len(x), router.num_choices, dtype=torch.float32)
        logits[:, choice] = by
        return logits

    for router in model.moelora.routers.values():
        object.__setattr__(router, "score", score.__get__(router))


@torch.no_grad()
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("scope", SCOPES)
def test_who_chooses_no_expert_is_the_base(scope, level):
    model = null(router_scope=scope, routing_level=level, num_experts_per_tok=1)
    prefer(model, EXPERTS)
    assert torch.equal(model(tokens()).logits, causal_base()(tokens()).logits)
    report = model.route(input_ids=tokens())
    assert report.choice_names[-1] == NO_EXPERT and set(report.top_experts()) == {NO_EXPERT}
    assert bool((report.by_router[:, -1] == 1).all()) and bool(
        (report.probabilities[:, -1] > 0.99).all()
    )


@torch.no_grad()
def test_the_base_takes_its_share_of_the_weights():
    config = MoeLoraConfig(num_experts=3, num_experts_per_tok=2, null_expert=True)
    router = TopKRouter(config, 4)
    router.weight.copy_(torch.tensor([[2.0, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 0], [1, 3, 0, 0]]))
    # Logits: 2 0 0 1; 0 1 0 3; 0 0 0 0 (ties: whichever).
    routing = router(torch.eye(4)[:2])
    share = torch.tensor([2.0, 1.0]).softmax(0)
    assert routing.expert_ids.tolist() == [[0, -1], [-1, 1]]
    torch.testing.assert_close(routing.expert_weights[0], torch.tensor([share[0], 0]))
    torch.testing.assert_close(
        routing.expert_weights[1], torch.tensor([0, torch.tensor([3.0, 1.0]).softmax(0)[1]])
    )
    assert routing.logits.shape == (2, 4)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("top_k", [1, 2])
def test_every_router_parameter_learns(level, top_k):
    model = null(routing_level=level, num_experts_per_tok=top_k).train()
    ids = tokens(4, 8)
    labels = ids.masked_fill(prompt_mask(ids, 4), -100)
    model(ids, labels=labels).loss.backward()
    for name, parameter in model.moelora.routers.named_parameters():
        assert bool(parameter.grad.any(1).all()), f"a row of {name}"


@pytest.mark.parametrize("level", LEVELS)
def test_a_gate_learns_to_send_some_texts_to_the_base(level):
    model = null(routing_level=level, router_scope="model", num_experts_per_tok=1).train()
    ids = torch.cat([tokens(4, 6, seed=1) % 20 + 3, tokens(4, 6, seed=2) % 20 + 30])
    targets = torch.tensor([1] * 4 + [EXPERTS] * 4)
    optimizer = torch.optim.Adam(model.moelora.routers.parameters(), lr=0.1)
    for _ in range(40):
        optimizer.zero_grad()
        (routing,) = model.routing_only(input_ids=ids)
        rows = targets if level == "sequence" else targets.repeat_interleave(6)
        nn.functional.cross_entropy(routing.logits, rows).backward()
        optimizer.step()
    chosen = model.eval().route(input_ids=ids).top_experts()
    assert chosen == ["expert_1"] * 4 + [NO_EXPERT] * 4


def test_targets_may_name_the_base_and_nothing_beyond_it():
    model = null().train()
    targets = torch.tensor([EXPERTS, -100])
    out = model(tokens(), labels=tokens(), expert_targets=targets, output_expert_routing=True)
    assert bool(out.expert_aux_loss > 0)
    with pytest.raises(ValueError, match="expected 0 … 4"):
        model(tokens(), expert_targets=torch.tensor([EXPERTS + 1, 0]))
    with pytest.raises(ValueError, match="expected 0 … 3"):
        causal()(tokens(), expert_targets=targets)
    with pytest.raises(ValueError, match="expert 0, which is banned"):
        model(tokens(), expert_targets=torch.tensor([0, EXPERTS]), banned_experts="expert_0")
    model(tokens(), expert_targets=targets, banned_experts="expert_0")


def test_the_balancing_loss_counts_the_base_too():
    model = null(router_scope="model").train()
    prefer(model, EXPERTS)
    model(tokens(), labels=tokens())
    load = model.moelora.load
    assert load.current.shape == (1, EXPERTS + 1)
    assert (
        int(load.current.sum()) == 2 * tokens().numel()
        and int(load.current[0, -1]) == tokens().numel()
    )


@torch.no_grad()
def test_a_ban_leaves_the_base():
    model = null(num_experts_per_tok=1)
    prefer(model, 0)
    (routing, *_) = model(
        tokens(), banned_experts="expert_0", output_expert_routing=True
    ).expert_routing
    assert not bool((routing.expert_ids == 0).any())
    for name in ("expert_1", "expert_2", "expert_3"):
        prefer(model, EXPERTS)
        with model.use_experts(ban=name):
            assert torch.equal(model(tokens()).logits, causal_base()(tokens()).logits)


def test_experts_come_and_go_and_the_base_stays_a_choice():
    model = null(router_scope="model")
    (router,) = model.moelora.routers.values()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    model.train()(tokens(), labels=tokens()).loss.backward()
    optimizer.step()
    before, state = (
        router.weight.detach().clone(),
        optimizer.state[router.weight]["exp_avg"].clone(),
    )
    change = model.add_expert("law")
    resume_optimizer(optimizer, change)
    (router,) = model.moelora.routers.values()
    after = router.weight.detach()
    assert torch.equal(after[:EXPERTS], before[:EXPERTS]) and torch.equal(after[-1], before[-1])
    torch.testing.assert_close(after[EXPERTS], before[:EXPERTS].mean(0))
    moved = optimizer.state[router.weight]["exp_avg"]
    assert torch.equal(moved[-1], state[-1]) and torch.equal(moved[:EXPERTS], state[:EXPERTS])
    assert not bool(moved[EXPERTS].any())
    model.remove_expert("expert_0")
    (router,) = model.moelora.routers.values()
    assert torch.equal(router.weight[-1].detach(), before[-1]) and len(router.weight) == EXPERTS + 1
    assert model.moelora.load.current.shape == (1, EXPERTS + 1)
    model(tokens(), labels=tokens()).loss.backward()


@torch.no_grad()
def test_it_starts_from_prototypes_with_texts_of_its_own():
    model = null(router_scope="model", routing_level="sequence", num_experts_per_tok=1)
    texts = {
        name: list(tokens(4, 6, seed=n) % 8 + 3 + 11 * n)
        for n, name in enumerate(model.moelora_config.choice_names)
    }
    with pytest.raises(ValueError, match=r"missing \['\(base\)'\]"):
        initialise(model, "prototype", {k: v for k, v in texts.items() if k != NO_EXPERT})
    initialise(model, "prototype", texts)
    for name, rows in texts.items():
        assert model.route(input_ids=torch.stack(rows)).top_experts() == [name] * 4
    arrow = null(router="arrow")
    with pytest.raises(ValueError, match="null_expert"):
        initialise(arrow, "arrow")


@torch.no_grad()
@pytest.mark.parametrize("level", LEVELS)
def test_it_generates_and_saves(level, tmp_path):
    model = null(routing_level=level)
    out = model.generate(tokens(), max_new_tokens=4, do_sample=False)
    model.save_pretrained(tmp_path)
    again = MoeLoraForCausalLM.from_pretrained(
        str(tmp_path), base=copy.deepcopy(causal_base())
    ).eval()
    assert torch.equal(again.generate(tokens(), max_new_tokens=4, do_sample=False), out)
    assert again.moelora_config.null_expert
