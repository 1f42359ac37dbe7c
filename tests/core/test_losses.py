"""The router losses' gradient is that of CE + losses by plain autograd, however the loop treats the
loss.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from core.mixtures import LEVELS, SCOPES, causal, classifier
from torch.nn.functional import cross_entropy
from training.runs import (
    LOSSES,
    TOLERANCE,
    assert_same,
    batch,
    by_the_book,
    classes,
    difference,
    gradients,
    gradients_of,
    only_routers,
    open_window,
    rows_of,
    train,
    without_losses,
)
from transformers import DataCollatorWithFlattening

from moelora.training import MoeLoraCallback

TARGETS = {"token": torch.arange(40).view(4, 10) % 6 - 1, "sequence": torch.tensor([3, -1, 0, 1])}


def _targets(level):
    """Expert numbers with some −100 among them, of the shape for `level`."""
    targets = TARGETS[level].clone()
    targets[targets < 0] = -100
    return targets.clamp(max=3)


def _assert_by_the_book(model, inputs, targets=None):
    fractions = open_window(model)
    expected, value = by_the_book(model, inputs, fractions, targets)
    assert_same(
        gradients(model, **inputs, **({} if targets is None else {"expert_targets": targets})),
        expected,
    )
    open_window(model)
    model.zero_grad()
    torch.manual_seed(0)
    found = model(**inputs, expert_targets=targets).expert_aux_loss
    torch.testing.assert_close(found.double(), value.double(), rtol=1e-6, atol=0)
    # Otherwise all of this would hold with the losses lost.
    assert difference(gradients(without_losses(model), **inputs), expected) > 0.05


@pytest.mark.parametrize("items", [None, 57])
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("level", LEVELS)
def test_gradients_are_those_of_ce_plus_router_losses(level, scope, items):
    model = causal(routing_level=level, router_scope=scope, **LOSSES).double()
    inputs = batch() if items is None else {**batch(), "num_items_in_batch": torch.tensor(items)}
    _assert_by_the_book(model, inputs)


@pytest.mark.parametrize("per_row", [True, False])
@pytest.mark.parametrize("level", LEVELS)
def test_expert_targets_cost_their_cross_entropy_and_ignored_rows_nothing(level, per_row):
    model = causal(routing_level=level, expert_target_loss_coef=0.6, **LOSSES).double()
    _assert_by_the_book(model, batch(), _targets("sequence" if per_row else level))


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("name", ["bert", "llama"])
def test_a_classifiers_router_losses_are_means_over_sequences(name, level):
    _assert_by_the_book(classifier(name, routing_level=level, **LOSSES).double(), classes())


def test_gpt2_with_dropout_has_the_same_router_losses():
    _assert_by_the_book(causal("gpt2", **LOSSES).double(), batch())


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("level", LEVELS)
def test_padding_changes_no_gradient(level, side):
    model = causal(routing_level=level, **LOSSES).double()
    assert_same(gradients(model, **batch(padding=7, side=side)), gradients(model, **batch()))


def test_a_packed_row_has_the_gradients_of_its_sequences():
    model = causal(**LOSSES).double()
    inputs = batch()
    rows = [{n: t[row["attention_mask"] == 1] for n, t in row.items()} for row in rows_of(inputs)]
    packed = DataCollatorWithFlattening()(
        [{n: r[n].tolist() for n in ("input_ids", "labels")} for r in rows]
    )
    assert packed["input_ids"].shape[0] == 1
    items = torch.tensor(31)
    found = gradients(model, **packed, num_items_in_batch=items, use_cache=False)
    assert_same(found, gradients(model, **inputs, num_items_in_batch=items))


def test_a_factor_on_the_loss_scales_all_gradients_alike():
    model = causal(**LOSSES).double()
    expected = {name: 1024 * g for name, g in gradients(model, **batch()).items()}
    assert_same(gradients(model, scale=1024.0, **batch()), expected)


def _outside_gradients(model, inputs, scale=1.0):
    """The gradients where the loop takes the labels out and computes the loss from the logits."""
    open_window(model)
    model.train().zero_grad()
    outputs = model(**{n: t for n, t in inputs.items() if n != "labels"})
    logits, labels = outputs.logits[:, :-1].flatten(0, 1), inputs["labels"][:, 1:].flatten()
    (scale * cross_entropy(logits, labels)).backward()
    return gradients_of(model)


def test_a_loss_computed_outside_of_the_model_keeps_the_router_losses():
    model = causal(**LOSSES).double()
    assert_same(_outside_gradients(model, batch()), gradients(model, **batch()))


def test_a_scaled_loss_outside_of_the_model_takes_the_scale_from_loss_scale():
    model = causal(**LOSSES).double()
    model.moelora.loss_scale = 512.0
    expected = {name: 512 * g for name, g in gradients(model, **batch()).items()}
    assert_same(_outside_gradients(model, batch(), scale=512.0), expected)


def test_fp16_without_labels_needs_the_callback_or_a_scale():
    model = causal(**LOSSES).train()
    ids = batch()["input_ids"]
    with torch.autocast("cpu", torch.float16):
        with pytest.raises(ValueError, match="MoeLoraCallback"):
            model(ids)
        model(ids, labels=ids)
        model.moelora.loss_scale = 2.0
        model(ids)
    with torch.autocast("cpu", torch.bfloat16):
        model.moelora.loss_scale = None
        model(ids)


@pytest.mark.parametrize("how", ["label_smoothing", "compute_loss_func"])
def test_trainer_taking_the_labels_out_keeps_the_router_losses(how, tmp_path):
    """The router losses' own gradient, with minus without, is the one of a step with the labels
    inside.
    """

    def summed(outputs, labels, num_items_in_batch=None):
        logits = outputs.logits[:, :-1].flatten(0, 1)
        return cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum") / num_items_in_batch

    settings = (
        {"label_smoothing_factor": 0.2}
        if how == "label_smoothing"
        else {"compute_loss_func": summed}
    )
    data = rows_of(batch(8))
    found = []
    for extra in ({}, settings, {**settings, "callbacks": [MoeLoraCallback()]}):
        own = []
        for lossy in (True, False):
            model = causal(**LOSSES).double()
            open_window(model)
            model = model if lossy else without_losses(model)
            steps = {
                "max_steps": 1,
                "per_device_train_batch_size": 2,
                "gradient_accumulation_steps": 4,
            }
            own.append(train(model, data, tmp_path, **steps, **extra).gradients[0])
        found.append({name: own[0][name] - own[1][name] for name in only_routers(own[0])})
    assert_same(found[1], found[0])
    assert_same(found[2], found[0])


def test_sequence_level_without_labels_needs_router_mask():
    model = causal(routing_level="sequence", **LOSSES).train()
    ids = batch()["input_ids"]
    with pytest.raises(ValueError, match="router_mask"):
        model(ids)
    model(ids, router_mask=torch.ones(4, 3)).logits.sum().backward()
    assert all(g.abs().max() > 0 for g in only_routers(gradients_of(model)).values())


def test_callback_knows_the_scalers_factor_and_the_processes():
    model = causal()
    optimizer = SimpleNamespace(scaler=torch.amp.GradScaler("cpu", init_scale=1024.0))
    callback = MoeLoraCallback()
    for average, scale in ((True, 3 * 1024.0), (False, 1024.0)):
        args = SimpleNamespace(average_tokens_across_devices=average, world_size=3)
        callback.on_step_begin(args, None, None, model=model, optimizer=optimizer)
        assert model.moelora.loss_scale == scale
    callback.on_train_end(None, None, None, model=model)
    assert model.moelora.loss_scale is None


BAD_TARGETS = {
    "shape": (torch.zeros(4, 9, dtype=torch.long), r"shape \(4, 9\)"),
    "rows": (torch.zeros(3, dtype=torch.long), r"shape \(3,\)"),
    "too large": (torch.tensor([0, 1, 2, 4]), r"\[4\].*0 … 3"),
    "negative": (torch.tensor([0, 1, 2, -1]), r"\[-1\]"),
    "floats": (torch.zeros(4), "float32"),
}


@pytest.mark.parametrize("what", BAD_TARGETS)
def test_bad_expert_targets_are_refused(what):
    targets, message = BAD_TARGETS[what]
    with pytest.raises(ValueError, match=message):
        causal()(**batch(), expert_targets=targets)


def test_expert_targets_by_token_are_refused_at_sequence_level():
    with pytest.raises(ValueError, match=r"routing_level='sequence'"):
        causal(routing_level="sequence")(
            **batch(), expert_targets=torch.zeros(4, 10, dtype=torch.long)
        )


def test_evaluation_has_no_router_losses_unless_asked():
    model = causal(**LOSSES)
    outputs = model(**batch())
    assert "expert_aux_loss" not in outputs
    assert torch.equal(outputs.loss, without_losses(model)(**batch()).loss)
    asked = model(**batch(), output_expert_routing=True)
    assert asked.expert_aux_loss > 0
    assert torch.equal(asked.loss, outputs.loss)


def test_tolerance_is_tight_enough_to_see_one_token():
    model = causal(**LOSSES).double()
    inputs = batch()
    one_less = {**inputs, "attention_mask": inputs["attention_mask"].clone()}
    one_less["attention_mask"][0, -1] = 0
    one_less["labels"] = inputs["labels"].clone()
    assert difference(gradients(model, **one_less), gradients(model, **inputs)) > 1e4 * TOLERANCE
