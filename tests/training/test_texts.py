"""Texts and their padding: what is a prompt, what takes a loss, and what reaches the model through
collators.
"""

from __future__ import annotations

import pytest
import torch
from core.mixtures import NO_ROUTER_LOSS, causal
from tokenizers import normalizers, processors
from training.recipes import arguments
from training.runs import router_parameters
from training.tasks import gate, task, word_tokenizer
from transformers import (
    DataCollatorForSeq2Seq,
    DataCollatorWithFlattening,
    DataCollatorWithPadding,
    Trainer,
    default_data_collator,
)

from moelora.training import PadRouting, Texts


def test_the_prompt_is_what_a_router_would_be_given_and_the_target_what_is_learned():
    tokenizer = word_tokenizer()
    for fields in (("instruction", "output"), ("prompt", "completion")):
        texts = Texts.of([dict(zip(fields, ("what is two", "plus three")))], tokenizer, expert=2)
        row = texts[0]
        assert row["input_ids"].tolist() == [1, 3, 4, 5, 6, 7, 2]
        assert row["labels"].tolist() == [-100] * 4 + [6, 7, 2]
        assert row["router_mask"].tolist() == [True] * 4 + [False] * 3
        assert row["expert_targets"].shape == () and int(row["expert_targets"]) == 2
        assert texts.prompts()[0].tolist() == tokenizer("what is two")["input_ids"]


def test_a_whole_text_is_learned_from_its_first_token():
    for rows in (["two plus three"], [{"text": "two plus three"}]):
        row = Texts.of(rows, word_tokenizer())[0]
        assert set(row) == {"input_ids", "labels"}
        assert row["input_ids"].tolist() == row["labels"].tolist() == [1, 5, 6, 7, 2]
    assert Texts.of(["two"], word_tokenizer(eos_token=None))[0]["input_ids"].tolist() == [1, 5]


def test_the_end_stands_once_and_rows_keep_their_numbers():
    texts = Texts.of([{"prompt": "what", "completion": "two [EOS]"}, "is"], word_tokenizer())
    assert [row["input_ids"].tolist() for row in texts] == [[1, 3, 5, 2], [1, 4, 2]]
    assert [p.tolist() for p in texts.prompts()] == [[1, 3], [1, 4, 2]]
    both = Texts.joined([texts.subset([1]), texts])
    assert len(both) == 3 and torch.equal(both[0]["input_ids"], texts[1]["input_ids"])
    labelled = both.labelled(torch.tensor([2, 0, 1]))
    assert [int(row["expert_targets"]) for row in labelled] == [2, 0, 1]
    assert all(
        "expert_targets" not in row for rows in (both, labelled.unlabelled()) for row in rows
    )
    with pytest.raises(ValueError, match="2 expert_targets for 3 rows"):
        both.labelled([0, 1])


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "  ", "completion": "two"}, "Row 1 has an empty prompt"),
        ({"instruction": "", "output": "two"}, "Row 1 has an empty prompt"),
        ({"prompt": None, "completion": "two"}, "Row 1 has an empty prompt"),
        ({"prompt": "two", "completion": ""}, "Row 1 has an empty target"),
        ({"prompt": "two", "completion": None}, "Row 1 has an empty target"),
        ("\n", "Row 1 has an empty text"),
        (
            {"prompt": "two"},
            "Row 1 has the fields .*expected one of instruction, prompt with one of output",
        ),
        (7, "Row 1 is a int"),
        (
            {"prompt": "what is two plus three", "completion": "two"},
            "Row 1 has 6 tokens of prompt and 2 of target",
        ),
        ("what is two plus three two two", "more than max_length=7"),
        # A tokenizer without an end that drops this word leaves no token at all.
        ({"prompt": "unheard", "completion": "two"}, "Row 1 has no token in 'unheard'"),
        ({"prompt": "two", "completion": "unheard"}, "Row 1 has no token in 'unheard'"),
        ("unheard", "Row 1 has no token in 'unheard'"),
    ],
)
def test_what_is_wrong_is_named_by_its_row(row, message):
    tokenizer = word_tokenizer()
    if "no token" in message:
        tokenizer = word_tokenizer(eos_token=None)
        tokenizer._tokenizer.post_processor = processors.Sequence([])
        tokenizer._tokenizer.normalizer = normalizers.Replace("unheard", "")
    with pytest.raises(ValueError, match=message):
        Texts.of(["two", row], tokenizer, max_length=7)


def test_the_tokenizers_own_limit_holds_where_it_has_one():
    tokenizer = word_tokenizer(model_max_length=3)
    with pytest.raises(ValueError, match="more than max_length=3"):
        Texts.of(["two plus"], tokenizer)
    assert len(Texts.of(["two plus"], tokenizer, max_length=4)) == 1
    assert len(Texts.of(["two plus " * 200], word_tokenizer())) == 1


@pytest.mark.parametrize("rows", ["two plus three", {"math": ["two"]}])
def test_one_text_or_a_mapping_is_no_list_of_rows(rows):
    with pytest.raises(TypeError, match=r"expected .*rows"):
        Texts.of(rows, word_tokenizer())


def stock_collators(side: str = "right") -> dict:
    tokenizer = word_tokenizer(padding_side=side)
    return {
        "default": default_data_collator,
        "padding": DataCollatorWithPadding(tokenizer),
        "seq2seq": DataCollatorForSeq2Seq(tokenizer),
    }


@pytest.mark.parametrize("name", ["default", "padding", "seq2seq"])
def test_stock_collators_carry_one_number_a_row_and_rows_of_one_length(name):
    rows = list(task(1).labelled(1).subset([0, 6, 12]))
    batch = stock_collators()[name](rows)
    assert batch["expert_targets"].tolist() == [1, 1, 1]
    assert torch.equal(
        torch.as_tensor(batch["router_mask"]).bool(),
        torch.stack([row["router_mask"] for row in rows]),
    )
    targets = [{**row, "expert_targets": row["input_ids"] % 3} for row in rows]
    batch = stock_collators()[name](targets)
    assert torch.equal(batch["expert_targets"], batch["input_ids"] % 3)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", [None, "padding", "seq2seq"])
def test_ragged_rows_are_padded_on_the_models_side(name, side):
    rows = list(task(1).subset([0, 5]))
    if name == "padding":
        rows = [{k: v for k, v in row.items() if k != "labels"} for row in rows]
    rows = [{**row, "expert_targets": row["input_ids"] % 3} for row in rows]
    collator = None if name is None else stock_collators(side)[name]
    batch = PadRouting(collator, padding_side=None if collator else side)(rows)
    for i, row in enumerate(rows):
        length = len(row["input_ids"])
        where = slice(-length, None) if side == "left" else slice(0, length)
        rest = [j for j in range(12) if j not in range(12)[where]]
        assert all(torch.equal(batch[key][i, where], value) for key, value in row.items())
        assert batch["attention_mask"][i].sum() == length and bool(
            batch["attention_mask"][i, where].all()
        )
        assert not bool(batch["router_mask"][i, rest].any())
        assert bool((batch["expert_targets"][i, rest] == -100).all())
        assert name == "padding" or bool((batch["labels"][i, rest] == -100).all())
    assert batch["router_mask"].dtype == torch.bool and batch["expert_targets"].dtype == torch.int64


def test_padding_that_cannot_be_is_refused():
    rows = list(task(1).subset([0, 5]))
    with pytest.raises(ValueError, match="padding_side"):
        PadRouting(padding_side="middle")
    with pytest.raises(ValueError, match="1 of 2 rows"):
        PadRouting()([rows[0], {**rows[1], "expert_targets": torch.tensor(1)}])
    with pytest.raises(ValueError, match=r"row 1 has shape \(3,\); expected \[12\]"):
        PadRouting()(
            [
                {**row, "expert_targets": torch.ones(n, dtype=torch.int64)}
                for row, n in zip(rows, (7, 3))
            ]
        )
    with pytest.raises(ValueError, match="different keys"):
        PadRouting()([rows[0], {"input_ids": rows[1]["input_ids"]}])
    with pytest.raises(ValueError, match="DataCollatorWithFlattening made 1 rows of 2"):
        PadRouting(DataCollatorWithFlattening())(
            [{k: v.tolist() for k, v in row.items()} for row in rows]
        )
    # Where a row has no prompt of its own the model looks for one in its labels.
    assert "router_mask" not in PadRouting()(
        [rows[0], {k: rows[1][k] for k in ("input_ids", "labels")}]
    )


@pytest.mark.parametrize("level", ["sequence", "token"])
def test_the_stock_trainer_hands_it_all_to_the_model(level, tmp_path):
    texts = Texts.joined([task(0, 8).labelled(0), task(2, 8).labelled(2)])
    if level == "token":
        texts = Texts([{k: v for k, v in row.items() if k != "router_mask"} for row in texts])
        texts = Texts(
            [
                {**row, "expert_targets": row["expert_targets"].expand(len(row["labels"]))}
                for row in texts
            ]
        )
        model = causal(num_experts=3, router_scope="site", num_experts_per_tok=1, **NO_ROUTER_LOSS)
    else:
        model = gate()
    before = [p.detach().clone() for p in router_parameters(model)]
    seen: list[dict] = []
    model.register_forward_pre_hook(lambda m, args, kwargs: seen.append(kwargs), with_kwargs=True)
    args = arguments(tmp_path, per_device_train_batch_size=4)
    Trainer(model=model, args=args, train_dataset=texts, data_collator=PadRouting()).train()
    assert len(seen) == 2
    for inputs in seen:
        assert inputs["expert_targets"].dim() == (1 if level == "sequence" else 2)
        assert ("router_mask" in inputs) is (level == "sequence")
    assert not any(torch.equal(p, was) for p, was in zip(router_parameters(model), before))
