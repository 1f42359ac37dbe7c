"""Gates trained alone: they learn whose prompt it is, and nothing else moves."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from core.mixtures import LEVELS, NO_ROUTER_LOSS, SCOPES, causal
from training.runs import of_router, router_parameters
from training.tasks import GATE, choices, gate, share, task, tasks

from moelora.routers import ROUTERS, DescriptorRouter
from moelora.training import Texts, prompt_features, train_gate

KINDS: dict[str, dict[str, Any]] = {
    "mean": {},
    "last": {"router_pooling": "last"},
    "attention": {"router_pooling": "attention"},
    "mlp": {"router": "mlp"},
    "before layer 1": {"router_layer": 1, "target_modules": "all-linear"},
    "jitter": {"router_jitter_noise": 0.1},
}


def bits(model: Any) -> dict[str, torch.Tensor]:
    return copy.deepcopy(torch.nn.Module.state_dict(model))


def others(model: Any, before: dict[str, torch.Tensor]) -> list[str]:
    """What changed beside the routers."""
    after = torch.nn.Module.state_dict(model)
    return [k for k in before if not of_router(k) and not torch.equal(before[k], after[k])]


@pytest.mark.parametrize("kind", KINDS)
def test_a_gate_learns_whose_prompt_it_is_and_nothing_else_moves(kind):
    model = gate(**KINDS[kind])
    model.freeze_experts("green")
    before, trains = bits(model), [p.requires_grad for p in model.parameters()]
    report = train_gate(model, tasks(), epochs=20)
    assert report.losses[-1] < 0.2 * report.losses[0] and report.accuracy >= 0.95
    assert report.steps == 20 * 3 and len(report.losses) == 20 and report.seconds > 0
    assert others(model, before) == []
    assert [p.requires_grad for p in model.parameters()] == trains and not model.training
    assert all(p.grad is None for p in model.parameters())
    for name, texts in tasks(seed=1).items():
        assert share(model, name, texts) >= 0.95


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("scope", SCOPES)
def test_it_learns_at_both_levels_and_in_every_scope(scope, level):
    model = gate(router_scope=scope, routing_level=level)
    before = bits(model)
    train_gate(model, tasks(), epochs=15)
    assert others(model, before) == []
    found = [share(model, name, texts) for name, texts in tasks(seed=1).items()]
    assert sum(found) / 3 >= 0.9


# Described, not trained; nothing to train, twice; its texts hold contexts; it routes tokens alone.
OTHERS = {"descriptor", "hashed", "random", "context", "hybrid"}


@pytest.mark.parametrize("router", sorted(set(ROUTERS) - OTHERS))
@pytest.mark.parametrize("pooling", ["mean", "attention"])
def test_the_same_seed_gives_the_same_bits(router, pooling):
    found = []
    for seed in (0, 0, 1):
        model = gate(router=router, router_pooling=pooling, router_jitter_noise=0.1)
        torch.manual_seed(len(found))
        state = torch.random.get_rng_state()
        train_gate(model, tasks(8), epochs=2, seed=seed)
        assert torch.equal(state, torch.random.get_rng_state())
        found.append(torch.cat([p.detach().flatten() for p in router_parameters(model)]))
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("scope", ["model", "site"])
def test_a_gate_that_is_told_from_outside_learns_by_what_it_is_told(scope, level):
    options = {"context_size": 3}
    fields = {"router_scope": scope, "routing_level": level, "router_options": options}
    model = gate(router="context", **fields)
    told = torch.eye(3)
    texts = {
        name: Texts([{**row, "router_context": told[i]} for row in own])
        for i, (name, own) in enumerate(tasks(8).items())
    }
    report = train_gate(model, texts, epochs=20, learning_rate=0.05)
    assert report.losses[-1] < 0.5 * report.losses[0]
    prompts = torch.full((3, 4), 7)
    assert model.route(input_ids=prompts, router_context=told).top_experts() == list(texts)
    with pytest.raises(ValueError, match="reads router_context, which was not given"):
        train_gate(model, tasks(8))


def test_a_blending_gate_learns_its_texts():
    model = gate(router="hybrid", router_scope="site", routing_level="token")
    report = train_gate(model, tasks(), epochs=15)
    assert report.losses[-1] < 0.4 * report.losses[0]
    features = prompt_features(model, tasks()["red"])
    assert features.shape == (24, 32)


def test_a_gate_without_parameters_is_refused():
    model = gate(router="hashed", router_input_norm=False)
    with pytest.raises(ValueError, match="router='hashed' has no parameters"):
        train_gate(model, tasks(4))
    with pytest.raises(ValueError, match="router='hashed' reads no hidden states"):
        prompt_features(model, tasks(4)["red"])


def test_what_is_computed_once_gives_what_whole_passes_give():
    """The same step by the stock forward pass: AdamW's first step on the cross-entropy of the same
    prompts.
    """
    model, texts = gate(), tasks(4)
    other = copy.deepcopy(model)
    train_gate(model, texts, epochs=1, batch_size=64, learning_rate=0.01)
    joined = Texts.joined([own.labelled(i) for i, own in enumerate(texts.values())])
    (weight,) = router_parameters(other)
    optimizer = torch.optim.AdamW([weight], lr=0.01, weight_decay=0.0)
    rows = [other.routing_only(input_ids=prompt[None])[0].logits for prompt in joined.prompts()]
    targets = torch.stack([row["expert_targets"] for row in joined])
    torch.nn.functional.cross_entropy(torch.cat(rows), targets).backward()
    optimizer.step()
    (trained,) = router_parameters(model)
    torch.testing.assert_close(trained, weight, rtol=1e-4, atol=1e-5)


def test_the_forward_ends_at_the_router_and_targets_are_never_read():
    model, ran = gate(router_pooling="attention"), []
    for layer in model.model.layers:
        layer.self_attn.register_forward_pre_hook(lambda m, a: ran.append(1))
    train_gate(model, tasks(6), epochs=2)
    assert not ran
    texts, found = tasks(6), []
    for target in (5, 40):
        changed = {
            name: Texts(
                [{**r, "input_ids": r["input_ids"].where(r["router_mask"], target)} for r in own]
            )
            for name, own in texts.items()
        }
        model = gate()
        train_gate(model, changed, epochs=1)
        found.append(bits(model))
    assert all(torch.equal(found[0][k], found[1][k]) for k in found[0])


def test_no_expert_is_a_choice_to_be_learned():
    model = gate(num_experts=2, expert_names=["red", "green"], null_expert=True)
    names = ("red", "green", "(base)")
    train_gate(model, tasks(names=names))
    assert all(
        share(model, name, texts) >= 0.95 for name, texts in tasks(seed=1, names=names).items()
    )


def test_a_descriptor_router_learns_from_what_its_experts_do():
    model = gate(router="descriptor")
    model.describe_experts({name: own.prompts() for name, own in tasks(8).items()})
    (router,) = model.moelora.routers.values()
    assert isinstance(router, DescriptorRouter)
    train_gate(model, tasks(), learning_rate=0.005)
    assert all(share(model, name, texts) >= 0.9 for name, texts in tasks(seed=1).items())


def test_labels_may_be_one_a_token_and_left_out():
    red, blue = task(0).labelled(0), task(2).labelled(2)
    texts = Texts.joined([red, blue, task(1).labelled(-100)])
    model = gate()
    assert train_gate(model, texts).accuracy >= 0.95
    assert "green" not in choices(model, task(0, seed=1)) + choices(model, task(2, seed=1))
    # Halves of a prompt with experts of their own.
    rows = []
    for a, b in zip(task(0), task(1)):
        ids = torch.cat([a["input_ids"], b["input_ids"]])
        targets = torch.tensor([0] * len(a["input_ids"]) + [1] * len(b["input_ids"]))
        rows.append({"input_ids": ids, "labels": ids, "expert_targets": targets})
    model = gate(routing_level="token")
    assert train_gate(model, Texts(rows), epochs=60).accuracy >= 0.95
    (routing,) = model.routing_only(input_ids=rows[0]["input_ids"][None])
    assert routing.expert_ids.flatten().tolist() == rows[0]["expert_targets"].tolist()


def test_features_are_what_the_router_reads():
    model, texts = gate(router_pooling="last"), task(1, 7)
    found = prompt_features(model.train(), texts, batch_size=3)
    assert model.training and found.shape == (7, 32) and found.dtype == torch.float32
    last = torch.stack([model.get_input_embeddings()(prompt[-1]) for prompt in texts.prompts()])
    torch.testing.assert_close(found, last / last.square().mean(1, keepdim=True).sqrt())
    by_token = prompt_features(gate(routing_level="token"), texts, batch_size=3)
    # The mean of what it reads of each token, which at sequence level is brought to length again.
    mean = prompt_features(gate(), texts)
    torch.testing.assert_close(
        by_token / by_token.square().mean(1, keepdim=True).sqrt(), mean, rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ({"red": task(0), "pink": task(1)}, "no expert 'pink'. The choices are: red, green, blue"),
        ({"(base)": task(0)}, r"no expert '\(base\)'. The choices are: red, green, blue"),
        ({}, "no texts"),
        ({"red": Texts([])}, "no texts"),
        (task(0), "Row 0 has no expert_targets"),
        (
            Texts.joined([task(0, 3).labelled(1), task(1, 1).labelled(3)]),
            "Row 3 has expert_targets 3; expected 0",
        ),
        (task(0).labelled(-100), "no expert_targets that count"),
        (Texts([{**r, "expert_targets": r["input_ids"] % 3} for r in task(0)]), "one number each"),
    ],
)
def test_texts_that_teach_nothing_are_refused_before_anything_moves(texts, message):
    model = gate()
    before = bits(model)
    with pytest.raises(ValueError, match=message):
        train_gate(model.train(), texts, weight_decay=0.1)
    assert all(torch.equal(before[k], v) for k, v in bits(model).items()) and model.training


def test_what_is_no_texts_and_options_out_of_range():
    model = gate()
    with pytest.raises(TypeError, match="'red' is a list; expected Texts"):
        train_gate(model, {"red": ["some text"]})
    with pytest.raises(TypeError, match="texts is a list; expected Texts"):
        train_gate(model, ["some text"])
    for options in (
        {"epochs": 0},
        {"batch_size": 0},
        {"learning_rate": 0.0},
        {"weight_decay": -1.0},
        {"seed": -1},
    ):
        with pytest.raises(ValueError, match=next(iter(options))):
            train_gate(model, tasks(2), **options)
    with pytest.raises(ValueError, match="no texts"):
        prompt_features(model, Texts([]))


@pytest.mark.parametrize("forced", [{"experts": "red"}, {"ban": "red"}])
def test_nothing_trains_inside_use_experts(forced):
    model = gate()
    with model.use_experts(**forced), pytest.raises(ValueError, match="use_experts"):
        train_gate(model, tasks(2))


def test_an_error_on_the_way_leaves_modes_and_gradients_as_they_were():
    model = causal(**{**GATE, "router_pooling": "attention", **NO_ROUTER_LOSS}).train()
    (router,) = model.moelora.routers.values()
    router.requires_grad_(False)
    broken = Texts(
        [
            *task(0, 3).labelled(0),
            {"input_ids": torch.tensor([999]), "expert_targets": torch.tensor(1)},
        ]
    )
    with pytest.raises(IndexError):
        train_gate(model, broken)
    assert model.training and not any(p.requires_grad for p in router.parameters())
    assert all(p.grad is None for p in model.parameters())
