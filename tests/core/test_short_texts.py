"""Sequence level where texts have labels from their start and are no longer than the prefix."""

import pytest
import torch
from core.mixtures import causal, classifier, tokens
from training.runs import classes, rows_of, trainer


def test_a_batch_without_a_label_left_raises_and_a_shorter_prefix_helps(tmp_path):
    ids = tokens(batch=4, length=10)
    data = rows_of({"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)})
    run = trainer(causal(routing_level="sequence"), data, tmp_path)
    with pytest.raises(ValueError, match=r"router_prefix_tokens=32.*router_mask"):
        run.train()
    run = trainer(causal(routing_level="sequence", router_prefix_tokens=4), data, tmp_path)
    run.train()
    assert all(entry["loss"] > 0 for entry in run.state.log_history if "loss" in entry)


def test_padding_does_not_hide_that_the_texts_are_short():
    model = causal(routing_level="sequence", router_prefix_tokens=8).train()
    ids = tokens(batch=2, length=16)
    mask = (torch.arange(16) < 7).long().expand(2, -1)
    labels = ids.masked_fill(mask == 0, -100)
    with pytest.raises(ValueError, match="No label is left"):
        model(input_ids=ids, attention_mask=mask, labels=labels)
    # One row with something to learn from is enough.
    mask = mask.clone()
    mask[0] = 1
    labels = ids.masked_fill(mask == 0, -100)
    assert model(input_ids=ids, attention_mask=mask, labels=labels).loss > 0


def test_evaluation_prompts_and_classes_are_not_refused():
    ids = tokens()
    model = causal(routing_level="sequence")
    model.eval()(input_ids=ids, labels=ids)
    labels = ids.masked_fill(torch.arange(10) < 9, -100)
    assert model.train()(input_ids=ids, labels=labels).loss > 0
    assert model(input_ids=ids, router_mask=torch.ones_like(ids), labels=ids).loss > 0
    assert classifier(routing_level="sequence").train()(**classes()).loss > 0
