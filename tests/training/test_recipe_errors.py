"""What recipes cannot use: found before anything trains."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from core.mixtures import classifier
from training.recipes import arguments, bits, same, state
from training.tasks import gate, task, tasks

from moelora.recipes import train_mixda
from moelora.training import Texts, train_expert, train_in_stages, train_jointly
from moelora.training import fitting as module


@pytest.fixture
def untrained(monkeypatch) -> list[Any]:
    """No Trainer may be made."""

    def refuse(*args, **kwargs):
        raise AssertionError("something trained")

    monkeypatch.setattr(module, "Trainer", refuse)


ROW = {"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}
DATA = [
    ({"pink": task(0)}, ValueError, "no expert 'pink'. The choices are: red, green, blue"),
    ({"red": task(0), "(base)": task(1)}, ValueError, r"no expert '\(base\)'"),
    ({}, ValueError, "There is no data: give some of each of red, green, blue"),
    ({"red": task(0), "green": Texts([])}, ValueError, "nothing to train 'green' on"),
    ({"red": []}, ValueError, "nothing to train 'red' on"),
    (task(0), TypeError, "The data is a Texts"),
    ({"red": iter([])}, TypeError, "The data of 'red' is a list_iterator; expected Texts"),
    ({"red": "a text"}, TypeError, "The data of 'red' is a str; expected Texts"),
    ({"red": ["a text"]}, ValueError, "Row 0 of 'red' has str; expected input_ids"),
    (
        {"red": [ROW, {"labels": [1]}]},
        ValueError,
        r"Row 1 of 'red' has \['labels'\]; expected input_ids",
    ),
    ({"red": [{**ROW, "labels": 1}]}, ValueError, r"Row 0 of 'red' has labels of shape \[\]"),
    (
        {"red": [{**ROW, "labels": [1]}]},
        ValueError,
        r"labels of shape \[1\] and input_ids of shape \[3\]",
    ),
]


@pytest.mark.parametrize("recipe", [train_in_stages, train_jointly])
@pytest.mark.parametrize(("data", "error", "message"), DATA)
def test_data_that_is_none(recipe, data, error, message, untrained, tmp_path):
    with pytest.raises(error, match=message):
        recipe(gate(), data, arguments(tmp_path))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (
            {"gate": {"epoch": 3}},
            ValueError,
            r"no option \['epoch'\]. Its options are: epochs, learning_rate",
        ),
        ({"gate": {"epochs": 0}}, ValueError, "epochs=0 is too small"),
        ({"gate": {"learning_rate": 0.0}}, ValueError, "learning_rate=0.0 is out of range"),
        (
            {"labels": "domain"},
            ValueError,
            "labels='domain' is unknown; expected one of: task, oracle",
        ),
        (
            {"args": {"max_steps": 3}},
            TypeError,
            "args is a dict; expected transformers' TrainingArguments",
        ),
    ],
)
def test_options_that_do_not_exist_are_found_before_hours_of_training(
    changes, error, message, untrained, tmp_path
):
    given = {"args": arguments(tmp_path), **changes}
    with pytest.raises(error, match=message):
        train_in_stages(gate(), tasks(), given.pop("args"), **given)


def test_texts_that_no_oracle_can_label_are_found_before_too(untrained, tmp_path):
    silent = Texts(
        [{**row, "labels": torch.full_like(row["labels"], -100)} for row in task(1).rows]
    )
    with pytest.raises(ValueError, match="Row 24 has no target token"):
        train_in_stages(
            gate(), {"red": task(0), "green": silent}, arguments(tmp_path), labels="oracle"
        )


@pytest.mark.parametrize("name", ["pink", "(base)"])
def test_only_an_expert_trains_as_one(name, untrained, tmp_path):
    with pytest.raises(ValueError, match="no expert"):
        train_expert(gate(null_expert=True), name, task(0), arguments(tmp_path))


@pytest.mark.parametrize("recipe", [train_in_stages, train_jointly])
def test_inside_use_experts_no_recipe_begins(recipe, untrained, tmp_path):
    model = gate()
    with (
        model.use_experts("red"),
        pytest.raises(ValueError, match=r"use_experts\(\).*leave it first"),
    ):
        recipe(model, tasks(), arguments(tmp_path))


def test_evaluation_without_anything_to_evaluate_on_is_the_trainers_error(tmp_path):
    model = gate()
    was, before = state(model), bits(model)
    with pytest.raises(ValueError, match="eval_dataset"):
        train_in_stages(model, tasks(), arguments(tmp_path, eval_strategy="epoch"))
    assert state(model) == was and same(bits(model), before)


MIXDA: dict[str, Any] = {
    "domains": {"red": task(0), "green": task(1)},
    "task": task(2),
    "task_expert": "blue",
}


@pytest.mark.parametrize(
    ("fields", "changes", "error", "message"),
    [
        ({"null_expert": False}, {}, ValueError, "with null_expert=True"),
        (
            {"num_experts_per_tok": 1},
            {},
            ValueError,
            "num_experts_per_tok=1 .* use num_experts_per_tok=2",
        ),
        ({}, {"task_expert": "red"}, ValueError, "task_expert='red' is a domain's expert"),
        ({}, {"task_expert": "pink"}, ValueError, "no expert 'pink'"),
        ({}, {"task_expert": "(base)"}, ValueError, r"no expert '\(base\)'"),
        ({}, {"domains": {"pink": task(0)}}, ValueError, "no expert 'pink'"),
        ({}, {"domains": {"(base)": task(0)}}, ValueError, r"no expert '\(base\)'"),
        ({}, {"domains": {}}, ValueError, "no data"),
        ({}, {"domains": {"red": Texts([])}}, ValueError, "nothing to train 'red' on"),
        ({}, {"task": Texts([])}, ValueError, "nothing to train 'blue' on"),
        ({}, {"general": Texts([])}, ValueError, "general has no texts"),
        ({}, {"general": "a text"}, TypeError, "The data of 'general' is a str"),
    ],
)
def test_mixda_says_what_it_needs(fields, changes, error, message, untrained, tmp_path):
    model = gate(**{"null_expert": True, "num_experts_per_tok": 2, **fields})
    given = copy.copy({**MIXDA, **changes})
    with pytest.raises(error, match=message):
        train_mixda(model, given.pop("domains"), given.pop("task"), arguments(tmp_path), **given)


def test_texts_that_a_sequence_router_reads_to_their_end_are_refused(untrained, tmp_path):
    model = gate(null_expert=True, num_experts_per_tok=2, router_prefix_tokens=12)
    whole = Texts(
        [{"input_ids": row["input_ids"], "labels": row["input_ids"]} for row in task(0).rows]
    )
    given = {**MIXDA, "domains": {"red": whole}}
    with pytest.raises(
        ValueError, match="'red' have no prompt and 12 tokens at most.*router_prefix_tokens=12"
    ):
        train_mixda(model, given.pop("domains"), given.pop("task"), arguments(tmp_path), **given)


def test_a_classifier_has_no_oracle(untrained, tmp_path):
    with pytest.raises(TypeError, match="a classifier has none"):
        train_in_stages(
            classifier(num_experts_per_tok=1),
            {"expert_0": task(0)},
            arguments(tmp_path),
            labels="oracle",
        )
