"""Recipes: each expert sees its own data alone, and what was frozen is so again afterwards."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from core.mixtures import LEVELS, SCOPES, classifier
from training.recipes import Broken, arguments, bits, loss, moved, of_expert, same, state
from training.runs import classes, rows_of
from training.tasks import gate, share, task, tasks

from moelora.recipes import add_task
from moelora.training import (
    PadRouting,
    Texts,
    oracle_targets,
    train_expert,
    train_gate,
    train_in_stages,
    train_jointly,
)

NAMES = ("red", "green", "blue")
TOKEN = {"routing_level": "token", "router_scope": "site", "num_experts_per_tok": 2}
DECAY = {"weight_decay": 0.5}


class Spy:
    """A collator that notes which token ids and which keys it has seen."""

    def __init__(self):
        self.seen: list[dict[str, torch.Tensor]] = []

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        batch = PadRouting()(rows)
        self.seen.append(batch)
        return batch


@pytest.mark.parametrize("frozen", [(), ("red", "blue"), NAMES])
@pytest.mark.parametrize("fields", [{}, TOKEN])
def test_an_expert_trains_alone_and_nothing_else_has_moved_a_bit(fields, frozen, tmp_path):
    model = gate(**fields)
    model.freeze_experts(frozen)
    before, was = bits(model), state(model)
    first = loss(model, task(1), "green")
    assert train_expert(model, "green", task(1), arguments(tmp_path, max_steps=12, **DECAY)) > 0
    after = bits(model)
    assert moved(before, after) == {"expert.green"}
    assert all(not torch.equal(t, after[name]) for name, t in of_expert(before, "green").items())
    assert state(model) == was
    assert loss(model, task(1), "green") < first - 0.1


def test_a_routed_expert_trains_beside_the_shared_one(tmp_path):
    model = gate(num_shared_experts=1)
    used = []
    forced = model.use_experts
    model.use_experts = lambda weights: used.append(weights) or forced(weights)
    before = bits(model)
    train_expert(model, "red", task(0), arguments(tmp_path))
    assert moved(before, bits(model)) == {"expert.red"}
    train_expert(model, "blue", task(0), arguments(tmp_path))
    assert used == [{"blue": 1.0, "red": 1.0}, {"blue": 1.0}]


def test_what_takes_no_gradients_takes_none_again(tmp_path):
    model = gate().train()
    model.requires_grad_(False)
    was = state(model)
    before = bits(model)
    train_expert(model, "red", task(0), arguments(tmp_path))
    assert moved(before, bits(model)) == {"expert.red"} and state(model) == was


@pytest.mark.parametrize("fields", [{"lora_dropout": 0.2}, {**TOKEN, "lora_dropout": 0.2}])
def test_no_experts_data_reaches_another_one(fields, tmp_path):
    data, args = tasks(8), arguments(tmp_path, **DECAY)
    alone = gate(**fields)
    train_expert(alone, "green", data["green"], args)
    wanted = of_expert(bits(alone), "green")
    others = {"blue": task(0, 9, seed=5), "green": data["green"], "red": task(2, 9, seed=6)}
    model = gate(**fields)
    train_in_stages(model, others, args, gate={"epochs": 1})
    assert same(of_expert(bits(model), "green"), wanted)


def test_every_run_reads_its_own_texts_only(tmp_path):
    spy = Spy()
    train_in_stages(gate(), tasks(), arguments(tmp_path), collator=spy, gate={"epochs": 1})
    # A loader makes a batch more than there are steps.
    each = len(spy.seen) // 3
    assert each >= 2 and len(spy.seen) == 3 * each
    for i, batch in enumerate(spy.seen):
        ids = batch["input_ids"][batch["attention_mask"].bool()]
        assert set(((ids - 4) // 6).tolist()) == {i // each} and "expert_targets" not in batch


@pytest.mark.parametrize("fields", [{}, TOKEN, {"router": "mlp", "router_pooling": "last"}])
def test_in_stages_experts_learn_their_tasks_and_the_gate_which_is_which(fields, tmp_path):
    model = gate(active=False, **fields)
    before, was, held = bits(model), state(model), tasks(seed=1)
    report = train_in_stages(model, tasks(), arguments(tmp_path, max_steps=20), gate={"epochs": 12})
    assert moved(before, bits(model)) == {"routers", *(f"expert.{name}" for name in NAMES)}
    assert state(model) == was and report.oracle is None and list(report.experts) == list(NAMES)
    assert all(run.steps == 20 and run.loss > 0 for run in report.experts.values())
    assert report.seconds == pytest.approx(
        report.gate.seconds + sum(run.seconds for run in report.experts.values())
    )
    # A single token, further up, says less than a prompt.
    assert report.gate.accuracy >= (0.85 if fields.get("routing_level") else 0.95)
    for name, own in held.items():
        losses = {expert: loss(model, own, expert) for expert in (*NAMES, "(base)")}
        assert min(losses, key=losses.__getitem__) == name
        if not fields.get("routing_level"):
            assert share(model, name, own) >= 0.95 and loss(model, own) < losses["(base)"] - 0.1


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("level", LEVELS)
def test_every_scope_and_level_goes_through_both_recipes(level, scope, tmp_path):
    model, args = gate(routing_level=level, router_scope=scope), arguments(tmp_path, max_steps=1)
    was = state(model)
    train_in_stages(model, tasks(8), args, gate={"epochs": 1})
    assert train_jointly(model, tasks(8), args).steps == 1 and state(model) == was


def test_the_oracle_says_whose_a_text_is(tmp_path):
    """The names are exchanged, so that task and oracle disagree."""
    model, args = gate(active=False), arguments(tmp_path, max_steps=25)
    train_in_stages(model, tasks(), args, gate={"epochs": 1})
    model.freeze_experts(NAMES)
    exchanged = {"green": task(0), "red": task(1), "blue": task(2)}
    like = bits(model)
    report = train_in_stages(
        model, exchanged, arguments(tmp_path, learning_rate=1e-9), labels="oracle"
    )
    assert moved(like, bits(model)) >= {"routers"}
    found = oracle_targets(model, Texts.joined(exchanged.values()))
    assert report.oracle is not None and torch.equal(report.oracle.targets, found.targets)
    assert (
        float((report.oracle.targets.view(3, 24) == torch.arange(3)[:, None]).float().mean()) >= 0.9
    )
    assert all(share(model, name, own) >= 0.8 for name, own in tasks(seed=1).items())


def test_no_expert_takes_part_in_the_gates_stage_alone(tmp_path):
    model = gate(null_expert=True)
    data = tasks(names=(*NAMES, "(base)"))
    before = bits(model)
    report = train_in_stages(model, data, arguments(tmp_path), gate={"epochs": 20})
    assert list(report.experts) == list(NAMES)
    assert "base" not in moved(before, bits(model))
    assert all(share(model, name, task(n, seed=1)) >= 0.95 for n, name in enumerate(data))


def test_a_dataset_of_padded_rows_is_as_good_as_texts(tmp_path):
    def padded(texts: Texts) -> list[dict[str, Any]]:
        made = [PadRouting(padding_side="left")([row, *texts]) for row in texts]
        return [
            {k: v[0].tolist() for k, v in batch.items() if k != "router_mask"} for batch in made
        ]

    data = tasks(names=NAMES[:2])
    one, other = gate(), gate()
    for model, given in (
        (one, data),
        (other, {name: padded(texts) for name, texts in data.items()}),
    ):
        train_in_stages(model, given, arguments(tmp_path), gate={"epochs": 2})
    routers = {name: t for name, t in bits(one).items() if name.startswith("routers")}
    assert all(torch.equal(t, bits(other)[name]) for name, t in routers.items())
    for name, tensor in bits(one).items():
        torch.testing.assert_close(tensor, bits(other)[name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("level", LEVELS)
def test_jointly_everything_learns_at_once(level, tmp_path):
    model = gate(active=False, routing_level=level)
    before, was, first = (
        bits(model),
        state(model),
        loss(model, Texts.joined(tasks(seed=1).values())),
    )
    spy = Spy()
    report = train_jointly(model, tasks(), arguments(tmp_path, max_steps=30), collator=spy)
    assert report.steps == 30 and report.seconds > 0 and state(model) == was
    wanted = {"routers", "load", *(f"expert.{name}" for name in NAMES)}
    assert moved(before, bits(model)) == wanted
    for batch in spy.seen:
        ids = batch["input_ids"][:, 0]
        assert torch.equal((ids - 4) // 6, batch["expert_targets"])
    assert loss(model, Texts.joined(tasks(seed=1).values())) < first - 0.1
    assert all(share(model, name, own) >= 0.9 for name, own in tasks(seed=1).items())


def test_jointly_without_labels_the_routers_are_told_nothing(tmp_path):
    spy = Spy()
    labelled = {name: own.labelled(0) for name, own in tasks().items()}
    train_jointly(gate(), labelled, arguments(tmp_path), expert_targets=False, collator=spy)
    assert spy.seen and not any("expert_targets" in batch for batch in spy.seen)


def test_what_is_frozen_stays_so_in_joint_training(tmp_path):
    model = gate()
    model.freeze_experts("green")
    before = bits(model)
    train_jointly(model, tasks(), arguments(tmp_path, **DECAY))
    assert "expert.green" not in moved(before, bits(model)) and "expert.red" in moved(
        before, bits(model)
    )


def test_checkpoints_are_written_where_they_are_asked_for(tmp_path):
    args, folder = arguments(tmp_path), tmp_path / "runs"
    given = args.to_dict()
    train_in_stages(gate(), tasks(), args, gate={"epochs": 1})
    assert not [path for path in folder.rglob("*") if path.is_file()]
    train_in_stages(gate(), tasks(), args, gate={"epochs": 1}, checkpoints=True)
    for name in NAMES:
        assert (folder / name / "checkpoint-2" / "model.safetensors").is_file()
    assert args.to_dict() == given


def test_mixed_precision_leaves_no_wrapper_behind(tmp_path):
    model = gate()
    was = state(model)
    for _ in range(2):
        train_expert(model, "red", task(0), arguments(tmp_path, bf16=True))
        assert state(model) == was
    assert model(input_ids=task(0)[0]["input_ids"][None]).logits.dtype == torch.float32


def test_a_classifier_in_stages_but_for_its_gate(tmp_path):
    model = classifier(num_experts_per_tok=1)
    before = bits(model)
    train_expert(model, "expert_1", rows_of(classes(8)), arguments(tmp_path))
    found = moved(before, bits(model))
    assert "expert.expert_1" in found and not found & {
        "expert.expert_0",
        "expert.expert_2",
        "routers",
    }


def test_a_task_that_is_added_trains_its_expert_by_the_same_run(tmp_path):
    old = tasks(names=NAMES[:2])
    model, like = (gate(num_experts=2, expert_names=list(old)) for _ in range(2))
    train_gate(model, old)
    added = add_task(model, "blue", task(2), old=old, replay=0.5, args=arguments(tmp_path))
    assert added.expert_seconds > 0
    like.add_expert("blue", seed=0)
    train_expert(like, "blue", task(2), arguments(tmp_path))
    assert same(of_expert(bits(model), "blue"), of_expert(bits(like), "blue"))


def test_the_same_seed_gives_the_same_bits(tmp_path):
    def run(seed: int) -> dict[str, torch.Tensor]:
        model = gate(lora_dropout=0.2)
        train_in_stages(model, tasks(), arguments(tmp_path, seed=seed), gate={"epochs": 1})
        return bits(model)

    first = run(1)
    assert same(run(1), first) and not same(run(2), first)


@pytest.mark.parametrize("last", [1, 3, 6])
@pytest.mark.parametrize("recipe", [train_in_stages, train_jointly])
def test_a_run_that_fails_halfway_leaves_nothing_frozen_that_was_not(recipe, last, tmp_path):
    model = gate()
    model.freeze_experts("blue")
    was = state(model)
    with pytest.raises(RuntimeError, match="the disk is full"):
        recipe(model, tasks(), arguments(tmp_path, max_steps=8), collator=Broken(last))
    assert state(model) == was
