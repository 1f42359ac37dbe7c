"""A growing pool: which texts k-means keeps, and what replaying them does to the old tasks."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from adapters.peft_folders import save_adapter
from bases import causal_base
from core.mixtures import factors
from training.recipes import arguments
from training.tasks import choices, gate, share, task, tasks

from moelora.recipes import add_task, select_replay
from moelora.training import Texts, prompt_features, train_gate

OLD = ("red", "green")


def groups(each: int = 5, number: int = 4, seed: int = 0) -> torch.Tensor:
    """Points around well separated centres, `[number · each, 3]`, group by group."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(number, 3, generator=generator) * 100
    return (centres[:, None] + torch.randn(number, each, 3, generator=generator)).flatten(0, 1)


def pool(**fields: Any) -> tuple[Any, dict[str, Texts]]:
    """A gate that knows two tasks, and their texts."""
    model, old = gate(num_experts=2, expert_names=list(OLD), **fields), tasks(40, names=OLD)
    train_gate(model, old)
    return model, old


def bits(model: Any) -> dict[str, torch.Tensor]:
    return copy.deepcopy(torch.nn.Module.state_dict(model))


def test_one_text_of_each_cluster_the_nearest_to_its_centre():
    points = groups()
    kept = select_replay(points, 0.2)
    assert [i // 5 for i in kept] == [0, 1, 2, 3]
    for i, group in zip(kept, points.split(5)):
        distances = (group - group.mean(0)).norm(dim=1)
        assert i % 5 == int(distances.argmin())
    assert kept == select_replay(points, 4) == select_replay(points.half().float(), 4, seed=3)


@pytest.mark.parametrize(
    ("share", "expected"), [(0.0, 0), (0, 0), (0.07, 2), (0.05, 1), (0.5, 10), (1.0, 20), (20, 20)]
)
def test_a_share_is_rounded_up_and_all_are_different(share, expected):
    kept = select_replay(groups(), share)
    assert (
        len(kept) == len(set(kept)) == expected
        and kept == sorted(kept)
        and all(0 <= i < 20 for i in kept)
    )


def test_rounding_up_is_not_misled_by_floats():
    assert len(select_replay(torch.randn(100, 2), 0.07)) == 7
    assert select_replay(torch.empty(0, 3), 0.5) == []


def test_texts_that_are_alike_are_kept_once_each():
    points = torch.zeros(6, 2)
    points[5] = 1.0
    kept = select_replay(points, 4)
    assert len(set(kept)) == 4 and 5 in kept


def test_the_same_seed_keeps_the_same_texts():
    points = torch.randn(300, 8, generator=torch.Generator().manual_seed(0))
    one = select_replay(points, 0.1, seed=1)
    assert one == select_replay(points, 0.1, seed=1) and one != select_replay(points, 0.1, seed=2)


@pytest.mark.parametrize(
    ("features", "share", "error", "message"),
    [
        (groups(), 21, ValueError, "21 clusters of 20 texts"),
        (groups(), 1, ValueError, "share=1 could mean one text or all"),
        (groups(), 1.01, ValueError, "share=1.01 is out of range"),
        (groups(), -0.1, ValueError, "share=-0.1 is out of range"),
        (groups(), -2, ValueError, "share=-2 is too small"),
        (groups(), True, TypeError, "share=True is a bool"),
        (groups(), "10%", TypeError, "share='10%' is a str"),
        (torch.zeros(3), 0.5, ValueError, r"features has shape \(3,\)"),
        (groups() * torch.nan, 0.5, ValueError, "expected finite numbers"),
    ],
)
def test_what_cannot_be_kept_is_refused(features, share, error, message):
    with pytest.raises(error, match=message):
        select_replay(features, share)


def test_without_replay_the_old_tasks_are_lost_and_with_half_of_them_they_stay():
    found = {}
    for replay in (0.0, 0.5):
        model, old = pool()
        before = bits(model)
        # Steps so large that what is not replayed is lost in any geometry of the embeddings.
        options = {"epochs": 40, "learning_rate": 0.3}
        added = add_task(model, "blue", task(2, 40), old=old, replay=replay, gate=options)
        assert added.name == "blue" and added.expert_seconds == 0 and added.gate.accuracy >= 0.95
        assert {name: len(rows) for name, rows in added.kept.items()} == dict.fromkeys(
            OLD, int(40 * replay)
        )
        assert model.moelora_config.expert_names == [*OLD, "blue"]
        assert all(
            torch.equal(v, bits(model)[k]) for k, v in before.items() if not model.moelora.owns(k)
        )
        found[replay] = [share(model, name, own) for name, own in tasks(seed=1).items()]
    assert min(found[0.5]) >= 0.95 and found[0.0][2] >= 0.95
    assert sum(found[0.0][:2]) <= sum(found[0.5][:2]) - 0.5


def test_it_is_trained_on_the_new_texts_and_those_that_were_kept_alone():
    model, old = pool()
    like = copy.deepcopy(model)
    added = add_task(model, "blue", task(2, 40), old=old, replay=0.1, seed=3, gate={"epochs": 2})
    for name, own in old.items():
        assert added.kept[name] == select_replay(prompt_features(like, own), 0.1, seed=3)
        assert len(added.kept[name]) == 4
    like.add_expert("blue", seed=3)
    texts = {name: own.subset(added.kept[name]) for name, own in old.items()} | {
        "blue": task(2, 40)
    }
    train_gate(like, texts, epochs=2, seed=3)
    after = bits(like)
    assert all(torch.equal(v, after[k]) for k, v in bits(model).items())


def test_an_adapter_becomes_the_new_expert_bit_for_bit(tmp_path):
    model, old = pool(target_modules=["q_proj", "v_proj"])
    folder = save_adapter(tmp_path / "a", "llama", r=2, target_modules=["q_proj", "v_proj"])
    like = copy.deepcopy(model)
    like.add_expert("blue", adapter=folder, allow_base_mismatch=True)
    add_task(model, "blue", task(2), adapter=folder, old=old, replay=0.5)
    for expert in range(3):
        expected = like.moelora.expert(expert)
        for linear, own in model.moelora.expert(expert).items():
            assert torch.equal(own.A, expected[linear].A)
            assert torch.equal(own.B, expected[linear].B)
    assert causal_base().config.vocab_size == model.config.vocab_size


def test_a_fresh_expert_trains_on_the_new_texts_alone(tmp_path):
    model, old = pool()
    like = copy.deepcopy(model)
    args = arguments(tmp_path, max_steps=3, learning_rate=0.01)
    added = add_task(model, "blue", task(2), old=old, replay=0.5, args=args)
    assert added.expert_seconds > 0
    like.add_expert("blue", seed=0)
    for expert, name in enumerate(like.moelora_config.expert_names):
        now, before = factors(model, expert), factors(like, expert)
        same = [all(torch.equal(a, b) for a, b in zip(now[k], before[k])) for k in now]
        assert not any(same) if name == "blue" else all(same)
    assert share(model, "blue", task(2, seed=1)) >= 0.95


def test_no_expert_is_replayed_as_the_tasks_are():
    model = gate(num_experts=2, expert_names=list(OLD), null_expert=True)
    old = tasks(40, names=(*OLD, "(base)"))
    train_gate(model, old)
    added = add_task(model, "blue", task(3, 40), old=old, replay=0.5)
    assert len(added.kept["(base)"]) == 20
    names = (*OLD, "(base)", "blue")
    assert all(share(model, name, own) >= 0.9 for name, own in tasks(seed=1, names=names).items())


@pytest.mark.parametrize("fields", [{}, {"router": "mlp"}, {"router_pooling": "attention"}])
def test_deleting_a_task_keeps_how_the_others_are_told_apart(fields):
    model, old = pool(**fields)
    add_task(model, "blue", task(2, 40), old=old, replay=0.5)
    before = model.routing_only(input_ids=torch.stack([p[:4] for p in task(2).prompts()]))[0].logits
    model.remove_expert("red")
    after = model.routing_only(input_ids=torch.stack([p[:4] for p in task(2).prompts()]))[0].logits
    torch.testing.assert_close(after, before[:, 1:])
    assert all(
        share(model, name, own) >= 0.95 for name, own in tasks(seed=1).items() if name != "red"
    )
    assert set(choices(model, task(0))) <= {"green", "blue"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "red"}, "There is an expert 'red' already"),
        ({"name": "a/b"}, "a/b"),
        ({"old": {"pink": task(0)}}, "no expert 'pink'"),
        ({"old": {"red": Texts([])}}, "no texts"),
        ({"texts": Texts([])}, "no texts for 'blue'"),
        ({"replay": 41}, "41 clusters of 40 texts"),
        ({"gate": {"epochs": 0}}, "epochs=0"),
        ({"gate": {"learning_rate": float("nan")}}, "learning_rate"),
        ({"adapter": "nowhere"}, "nowhere"),
    ],
)
def test_an_error_leaves_the_model_as_it_was(changes, message):
    model, old = pool()
    before, names = bits(model), list(model.moelora_config.expert_names)
    config = model.moelora_config.to_dict()
    given: dict[str, Any] = {"name": "blue", "texts": task(2), "old": old, "replay": 0.1, **changes}
    with pytest.raises(ValueError, match=message):
        add_task(model, given.pop("name"), given.pop("texts"), **given)
    assert model.moelora_config.expert_names == names and model.moelora_config.to_dict() == config
    after = bits(model)
    assert before.keys() == after.keys() and all(
        torch.equal(v, after[k]) for k, v in before.items()
    )


def test_a_gate_that_fails_halfway_is_put_back(monkeypatch):
    model, old = pool(router_pooling="attention")
    before, texts, asked = bits(model), task(2), []
    texts.rows[-1]["input_ids"] = texts.rows[-1]["input_ids"] + 1000
    whole = type(model).routing_only

    def counted(self, **inputs):
        asked.append(inputs)
        return whole(self, **inputs)

    monkeypatch.setattr(type(model), "routing_only", counted)
    with pytest.raises(IndexError):
        add_task(model, "blue", texts, old=old, replay=0.5, gate={"batch_size": 1})
    # Two for the features, and then steps that had an effect.
    assert len(asked) > 4
    after = bits(model)
    assert len(before) == len(after) and all(torch.equal(v, after[k]) for k, v in before.items())
