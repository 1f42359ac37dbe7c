"""What every registered router must do: a new one is tested here without an edit."""

from __future__ import annotations

import copy
import pickle
import re

import pytest
import torch
from bases import causal_base
from core.mixtures import (
    NO_ROUTER_LOSS,
    POOLING_ROUTERS,
    ROUTERS_AT_LEVELS,
    SCOPES,
    causal,
    prompt_mask,
    rows_for,
    suited,
    tokens,
    told,
)

from moelora import ROUTERS, MoeLoraConfig, MoeLoraForCausalLM
from moelora.config_checks import ROUTER_POOLINGS

D = 16
every_router = pytest.mark.parametrize("router", sorted(ROUTERS))
pooling_router = pytest.mark.parametrize("router", POOLING_ROUTERS)
with_and_without_null = pytest.mark.parametrize(
    ("router", "null_expert"),
    [
        (r, n)
        for r in sorted(ROUTERS)
        for n in (False, True)
        if ROUTERS[r].takes_null_expert or not n
    ],
)


def made(router: str, **fields):
    torch.manual_seed(0)
    config = MoeLoraConfig(**suited(**{"num_experts": 5, "router": router, **fields}))
    return ROUTERS[router](config, D).eval()


def assert_same(one, two):
    for a, b in zip(one, two, strict=True):
        assert torch.equal(a, b)


@with_and_without_null
@pytest.mark.parametrize("per_tok", [1, 3])
def test_a_routing_has_its_shapes_and_promises(router, per_tok, null_expert):
    one = made(router, num_experts_per_tok=per_tok, null_expert=null_expert)
    routing = one(rows_for(one, 40))
    # In evaluation these two use all experts, whatever they are told.
    slots = one.num_choices if router in ("soft", "random") else per_tok
    assert routing.logits.shape == (40, 5 + null_expert) == (40, one.num_choices)
    assert routing.expert_ids.shape == routing.expert_weights.shape == (40, slots)
    assert slots == one.num_slots
    assert routing.logits.dtype == routing.expert_weights.dtype == torch.float32
    empty = routing.expert_ids < 0
    assert bool(((routing.expert_ids >= -1) & (routing.expert_ids < 5)).all())
    assert not routing.expert_weights[empty].any()
    if one.fills_every_slot:
        assert not empty.any()
        assert all(len(set(row)) == slots for row in routing.expert_ids.tolist())


@with_and_without_null
def test_who_is_banned_is_not_chosen(router, null_expert):
    one = made(router, null_expert=null_expert)
    banned = torch.tensor([True, False, True, True, False])
    bias = torch.full((one.num_choices,), 5.0)
    for selection_bias in (None, bias):
        routing = one(rows_for(one, 40), selection_bias, banned)
        chosen = routing.expert_ids[routing.expert_ids >= 0]
        assert not banned[chosen].any()


@pytest.mark.parametrize("pooling", ROUTER_POOLINGS)
@pytest.mark.parametrize("masked", [False, True])
@pooling_router
def test_prompts_are_pooled_and_routed_in_one_call(router, masked, pooling):
    one = made(router, routing_level="sequence", router_pooling=pooling, router_input_norm=True)
    if one.pooling == "attention":
        torch.nn.init.normal_(one.pool_query)
    x = torch.randn(4, 9, D)
    mask = prompt_mask(tokens(4, 9), 6) if masked else None
    assert_same(one(x, prompt_mask=mask), one(one.pool(x, mask)))
    bias = torch.randn(one.num_choices)
    banned = torch.arange(5) == 2
    assert_same(one(x, bias, banned, prompt_mask=mask), one(one.pool(x, mask), bias, banned))


@every_router
def test_a_mask_without_prompts_is_refused(router):
    one = made(router)
    x = rows_for(one, 4)
    shape = re.escape(str(tuple(x.shape)))
    with pytest.raises(ValueError, match=f"prompt_mask is for prompts.*{shape}"):
        one(x, prompt_mask=torch.ones(4, 3, dtype=torch.bool))


@every_router
def test_autocast_changes_no_bit_of_rows(router):
    one = made(router)
    x = rows_for(one, 40)
    plain = one(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert_same(one(x), plain)


@pytest.mark.parametrize("pooling", ROUTER_POOLINGS)
@pooling_router
def test_autocast_changes_no_bit(router, pooling):
    one = made(router, routing_level="sequence", router_pooling=pooling)
    if one.pooling == "attention":
        torch.nn.init.normal_(one.pool_query)
    x = torch.randn(4, 9, D)
    plain = one(x)
    pooled = one.pool(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert_same(one(x), plain)
        assert torch.equal(one.pool(x), pooled)


@every_router
def test_a_forward_pass_leaves_nothing_behind_and_copies_agree(router):
    one = made(router)
    before = dict(vars(one))
    x = rows_for(one, 7)
    routing = one(x)
    assert vars(one) == before
    for other in (copy.deepcopy(one), pickle.loads(pickle.dumps(one))):
        assert_same(other(x), routing)
        assert other.options == one.options


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize(
    ("router", "level", "null_expert"),
    [
        (r, level, n)
        for r, level in ROUTERS_AT_LEVELS
        for n in (False, True)
        if ROUTERS[r].takes_null_expert or not n
    ],
)
def test_it_learns_is_saved_and_changes_size_in_a_model(
    router, scope, level, null_expert, tmp_path
):
    fields = {"router_scope": scope, "routing_level": level, "null_expert": null_expert}
    model = causal(**suited(router=router, **fields, **NO_ROUTER_LOSS))
    ids = tokens()
    labels = ids.masked_fill(prompt_mask(ids, 4), -100)
    more = told(model, ids)
    model.train()(ids, labels=labels, **more).loss.backward()
    for name, parameter in model.moelora.routers.named_parameters():
        assert parameter.grad is not None and bool(parameter.grad.isfinite().all()), name
    model.eval()
    model.add_expert("law")
    model.remove_expert("expert_0")
    model.replace_expert("expert_1", copy_of="expert_2")
    logits = model(ids, **more).logits
    assert bool(logits.isfinite().all())
    model.save_pretrained(tmp_path)
    again = MoeLoraForCausalLM.from_pretrained(tmp_path, base=causal_base()).eval()
    assert torch.equal(again(ids, **more).logits, logits)
    assert again.moelora_config.router_options == model.moelora_config.router_options


@pytest.mark.parametrize("shared", [0, 1])
@every_router
def test_layers_may_lack_experts_and_share_others(router, shared):
    fields = {"experts_per_layer": [2, 3], "num_experts": 3 + shared, "num_shared_experts": shared}
    model = causal(**suited(router=router, **fields))
    ids = tokens()
    more = told(model, ids)
    labels = ids.masked_fill(prompt_mask(ids, 4), -100)
    model.train()(ids, labels=labels, **more).loss.backward()
    first = model.eval().route(input_ids=ids, **more).routing[0]
    lacking = (first.expert_ids == 2) & (first.expert_weights != 0)
    assert not bool(lacking.any())
    made = [
        model.generate(ids, max_new_tokens=2, do_sample=False, use_cache=cache, **more)
        for cache in (True, False)
    ]
    assert torch.equal(*made)
