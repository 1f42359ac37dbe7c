"""No logit depends on a later token; at sequence level none at or after the prompt's end does."""

from __future__ import annotations

import pytest
import torch
from bases import causal_base
from core.mixtures import ALL_CAUSAL, LEVELS, SCOPES, causal, into, left_padded, prompt_mask, tokens
from torch.nn.functional import cross_entropy

from moelora import Routing

LENGTH, PROMPT, CHANGED = 12, 4, 8
# fp32: rows of one batch may be multiplied in another order, nothing more. Real changes are above
# 1e-3.
CLOSE, FAR = 2e-6, 1e-3


def _pair(position=CHANGED):
    """Two rows that differ in the token at `position` alone."""
    ids = tokens(1, LENGTH).repeat(2, 1)
    ids[1, position] = (ids[0, position] + 7) % 60 + 3
    return ids


def _assert_same_before(logits, first, changed=CHANGED):
    """The two rows agree on [first, changed), and differ where the token that changed stands."""
    difference = (logits[0] - logits[1]).abs().amax(-1)
    assert difference[first:changed].max() < CLOSE
    assert difference[changed:].min() > FAR


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("name", ALL_CAUSAL)
def test_token_level_no_logit_depends_on_a_later_token(name, scope):
    model = causal(name, router_scope=scope)
    with torch.no_grad():
        _assert_same_before(model(_pair()).logits, 0)


def _with_router_mask(ids):
    return {"router_mask": prompt_mask(ids, PROMPT)}


def _with_short_router_mask(ids):
    return {"router_mask": torch.ones(2, PROMPT, dtype=torch.bool)}


def _with_labels(ids):
    return {"labels": ids.masked_fill(prompt_mask(ids, PROMPT), -100)}


def _with_labels_everywhere(ids):
    return {"labels": ids.clone()}


WAYS = [_with_router_mask, _with_short_router_mask, _with_labels, _with_labels_everywhere]


def _sequence_model(base=None, **fields):
    base = causal_base() if base is None else base
    return into(base, routing_level="sequence", router_prefix_tokens=PROMPT, **fields)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("way", WAYS)
def test_sequence_level_no_logit_after_the_prompt_depends_on_a_later_token(way, scope, training):
    model = _sequence_model(router_scope=scope).train(training)
    ids = _pair()
    with torch.no_grad():
        _assert_same_before(model(ids, **way(ids)).logits, 0)


@pytest.mark.parametrize("name", ALL_CAUSAL)
def test_sequence_level_is_causal_in_every_architecture(name):
    model = _sequence_model(causal_base(name))
    ids = _pair()
    with torch.no_grad():
        _assert_same_before(model(ids, **_with_labels(ids)).logits, 0)


@pytest.mark.parametrize("way", WAYS)
def test_sequence_level_the_whole_prompt_decides(way):
    model = _sequence_model()
    routings = []
    for position in range(PROMPT):
        ids = _pair(position)
        routing = model(ids, **way(ids)).expert_routing
        routings.append(min((r.logits[0] - r.logits[1]).abs().max().item() for r in routing))
    assert min(routings) > FAR


@pytest.mark.parametrize("way", WAYS[2:])
def test_sequence_level_padding_and_row_length_do_not_move_the_prompt(way):
    model = _sequence_model()
    row, other = tokens(1, LENGTH)[0], tokens(1, LENGTH + 5, seed=9)[0]
    together = left_padded([row, other])
    labels = together["input_ids"].masked_fill(together["attention_mask"] == 0, -100)
    if way is _with_labels:
        labels[:, : 5 + PROMPT] = -100
    alone = model(row[None], labels=way(row[None].repeat(2, 1))["labels"][:1])
    batch = model(**together, labels=labels)
    for a, b in zip(alone.expert_routing, batch.expert_routing):
        torch.testing.assert_close(a.logits[0], b.logits[0], rtol=1e-5, atol=1e-6)


def _loss(logits, labels):
    return cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def test_sequence_level_labels_inside_a_prefix_prompt_take_no_loss():
    model = _sequence_model()
    ids = torch.cat([tokens(1, LENGTH), tokens(1, LENGTH, seed=9)])
    labels = ids.clone()
    labels[1, : PROMPT + 2] = -100
    given = labels.clone()
    outputs = model(ids, labels=labels)
    counted = labels.clone()
    counted[0, :PROMPT] = -100
    torch.testing.assert_close(outputs.loss, _loss(outputs.logits, counted))
    assert torch.equal(labels, given), "the caller's labels stay as they are"
    assert abs(outputs.loss - _loss(outputs.logits, labels)) > FAR


def test_token_level_and_an_explicit_router_mask_leave_the_labels_alone():
    ids = tokens(2, LENGTH)
    for model, more in ((causal(), {}), (_sequence_model(), _with_router_mask(ids))):
        outputs = model(ids, labels=ids, **more)
        torch.testing.assert_close(outputs.loss, _loss(outputs.logits, ids))


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("padded", ["input_ids", "mask"])
def test_what_stands_in_the_padding_changes_nothing(level, padded):
    model = causal(routing_level=level)
    inputs = left_padded([tokens(1, 9)[0], tokens(1, 6, seed=4)[0]])
    before = model(**inputs).logits[1, 3:]
    inputs["input_ids"][1, :3] = torch.tensor([7, 8, 9])
    if padded == "mask":
        inputs["attention_mask"] = inputs["attention_mask"].bool()
    torch.testing.assert_close(model(**inputs).logits[1, 3:], before, rtol=1e-5, atol=1e-6)


TRAINING_REFUSALS = {
    "labels taken out of the batch": (lambda ids: {}, "pass router_mask"),
    "labels used outside of the model": (lambda ids: {"num_items_in_batch": 5}, "pass router_mask"),
    "packed rows": (
        lambda ids: {
            "labels": ids,
            "position_ids": torch.tensor([[0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 4, 5]] * 2),
        },
        "packed",
    ),
}


@pytest.mark.parametrize("case", TRAINING_REFUSALS)
def test_sequence_level_training_refuses_what_has_no_known_prompt(case):
    arguments, message = TRAINING_REFUSALS[case]
    model = _sequence_model().train()
    ids = tokens(2, LENGTH)
    with pytest.raises(ValueError, match=message):
        model(ids, **arguments(ids))
    causal().train()(ids, **arguments(ids))


MASK_REFUSALS = {
    "too long": (lambda: torch.ones(2, LENGTH + 1), "router_mask has shape"),
    "other batch": (lambda: torch.ones(3, LENGTH), "router_mask has shape"),
    "one axis": (lambda: torch.ones(LENGTH), "router_mask has shape"),
    "an empty row": (lambda: torch.tensor([[1] * LENGTH, [0] * LENGTH]), "row 1"),
}


@pytest.mark.parametrize("case", MASK_REFUSALS)
def test_a_router_mask_that_marks_no_prompt_is_refused(case):
    mask, message = MASK_REFUSALS[case]
    with pytest.raises(ValueError, match=message):
        _sequence_model()(tokens(2, LENGTH), router_mask=mask())


def test_a_router_mask_at_token_level_is_refused():
    with pytest.raises(ValueError, match="routing_level='sequence'"):
        causal()(tokens(), router_mask=torch.ones(2, 10))


def test_a_filled_cache_without_the_prompt_s_routing_is_refused():
    model = _sequence_model()
    prefix = model(tokens(2, 6), use_cache=True)
    unknown = causal_base()(tokens(2, 6), use_cache=True).past_key_values
    for more in ({}, {"router_mask": torch.ones(2, 1)}):
        with pytest.raises(ValueError, match=r"expert_routing=outputs\.expert_routing"):
            model(tokens(2, 1), past_key_values=unknown, **more)
    with pytest.raises(ValueError, match=r"expert_routing=outputs\.expert_routing"):
        mask = torch.ones(2, 1)
        model(tokens(2, 1), past_key_values=prefix.past_key_values, router_mask=mask)
    again = model(tokens(2, 6), use_cache=True).past_key_values
    step = model(tokens(2, 1), past_key_values=again, expert_routing=prefix.expert_routing)
    carried = model(tokens(2, 1), past_key_values=prefix.past_key_values)
    assert torch.equal(carried.logits, step.logits), "the cache carries its prompt's routing"


def test_a_routing_of_other_sequences_is_refused():
    model = _sequence_model()
    routing = tuple(Routing(*(t[:1] for t in r)) for r in model(tokens(2, 6)).expert_routing)
    with pytest.raises(ValueError, match="1 rows for a batch of 2"):
        model(tokens(2, 6), expert_routing=routing)


@torch.no_grad()
def test_a_handed_over_routing_may_have_empty_slots():
    ids = tokens(2, LENGTH)
    model = causal(routing_level="sequence")
    routing = model(ids).expert_routing
    empty = tuple(r._replace(expert_ids=torch.full_like(r.expert_ids, -1)) for r in routing)
    assert torch.equal(model(ids, expert_routing=empty).logits, causal_base()(ids).logits)
