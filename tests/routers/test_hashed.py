"""Experts by a hash of what is written: one table on every machine, evenly spread, and nothing that
learns.
"""

from __future__ import annotations

import pytest
import torch
from bases import causal_base
from core.decoding import CLOSE, GREEDY, WITH_LOGITS
from core.mixtures import LEVELS, SCOPES, causal, left_padded, prompt_mask, tokens
from training.runs import assert_bits, gradients

from moelora import MoeLoraConfig, MoeLoraForCausalLM
from moelora.routers import HashedRouter

# Of tokens 0 to 3 among seven experts. Checkpoints were trained with this table: it may not change.
EXPECTED = [[3, 0, 1], [6, 0, 1], [0, 4, 1], [5, 0, 1]]


def made(experts: int = 8, per_tok: int = 2, null_expert: bool = False, seed: int = 0):
    config = MoeLoraConfig(
        num_experts=experts,
        num_experts_per_tok=per_tok,
        null_expert=null_expert,
        router="hashed",
        router_options={"seed": seed},
    )
    return HashedRouter(config, 4)


def plain(number: int) -> int:
    """The mixing of 31 bits, in Python's integers."""
    for _ in range(2):
        number = ((number ^ (number >> 16)) * 0x45D9F3B) % 2**31
    return number ^ (number >> 15)


def test_the_table_is_that_of_a_plain_computation():
    table = made(5, per_tok=3, seed=11)(torch.arange(200)).expert_ids
    for token in range(200):
        row = plain(token ^ plain(12))
        ranks = [(plain((row * 0x45D9F3B + plain(key)) % 2**31), key) for key in range(5)]
        expected = [key for _, key in sorted(ranks, reverse=True)[:3]]
        assert table[token].tolist() == expected


def test_every_process_and_later_version_has_the_same_table():
    """Unlike Python's hash(), which has another seed in each process."""
    assert made(7, per_tok=3)(torch.arange(4)).expert_ids.tolist() == EXPECTED


@pytest.mark.parametrize("experts,per_tok", [(2, 1), (8, 2), (64, 4)])
def test_tokens_are_spread_evenly_and_slots_never_agree(experts, per_tok):
    routing = made(experts, per_tok)(torch.arange(32_000))
    counts = torch.bincount(routing.expert_ids.flatten(), minlength=experts).double()
    expected = 32_000 * per_tok / experts
    # Five standard deviations of a fair draw.
    assert (counts - expected).abs().max() < 5 * expected**0.5
    assert all(len(set(row)) == per_tok for row in routing.expert_ids[:2000].tolist())
    assert torch.equal(routing.expert_weights, torch.full((32_000, per_tok), 1 / per_tok))
    chosen = torch.zeros(32_000, experts).scatter(1, routing.expert_ids, 1.0)
    assert torch.equal(routing.logits.softmax(-1) * per_tok, chosen)
    other = made(experts, per_tok, seed=1)(torch.arange(32_000)).expert_ids
    same = (other[:, 0] == routing.expert_ids[:, 0]).double().mean()
    assert abs(same - 1 / experts) < 0.02


def test_an_expert_that_goes_or_comes_moves_its_own_tokens_alone():
    ids = torch.arange(5000)
    router = made(8, 1)
    before = router(ids).expert_ids[:, 0]
    router.resize([0, 1, 3, 4, 5, 6, 7])
    after = router(ids).expert_ids[:, 0]
    kept = before != 2
    assert torch.equal(after[kept], before[kept] - (before[kept] > 2).long())
    router.resize([0, 1, 2, 3, 4, 5, 6, None, None])
    grown = router(ids).expert_ids[:, 0]
    assert torch.equal(grown[grown < 7], after[grown < 7])
    assert ((grown == 7).sum() - (grown == 8).sum()).abs() < 150, "two newcomers are two"


@pytest.mark.parametrize("keep", [[0, 1, 2, 1], [2, 1, 2]])
def test_an_expert_and_its_copy_have_tokens_of_their_own(keep):
    router = made(3, 1)
    before = router(torch.arange(5000)).expert_ids[:, 0]
    router.resize(keep)
    after = router(torch.arange(5000)).expert_ids[:, 0]
    assert len(router.keys.unique()) == len(keep)
    stayed = [i for i, former in enumerate(keep) if i == former]
    for expert in stayed:
        now = after[before == expert]
        assert all(e == expert or e not in stayed for e in now.unique().tolist())
    assert bool((torch.bincount(after, minlength=len(keep)) > 800).all())


def test_the_null_expert_is_a_choice_and_a_ban_hands_its_tokens_on():
    router = made(4, 2, null_expert=True)
    routing = router(torch.arange(3000))
    empty = routing.expert_ids < 0
    assert bool((routing.expert_weights[empty] == 0).all())
    assert abs(empty.double().mean() - 1 / 5) < 0.02
    router = made(4, 2)
    routing = router(torch.arange(3000), None, torch.tensor([True, False, True, True]))
    assert bool((routing.expert_ids == torch.tensor([1, -1])).all())
    assert bool((routing.expert_weights == torch.tensor([1.0, 0.0])).all())


def test_prompts_are_told_apart_by_tokens_and_order_and_not_by_padding():
    router = made(64, 1)
    prompts = torch.randint(0, 50, (500, 9))
    hashes = router(prompts).expert_ids[:, 0]
    turned = router(prompts.flip(1)).expert_ids[:, 0]
    assert (hashes == turned).double().mean() < 0.1
    mask = torch.ones_like(prompts).bool()
    for left, right in ((3, 0), (0, 4)):
        padded = torch.nn.functional.pad(prompts, (left, right), value=7)
        marked = torch.nn.functional.pad(mask, (left, right))
        assert torch.equal(router(padded, prompt_mask=marked).expert_ids[:, 0], hashes)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("scope", SCOPES)
@torch.no_grad()
def test_generation_equals_one_forward_with_cache_padding_and_beams(scope, level):
    model = causal(router="hashed", routing_level=level, router_scope=scope)
    ids = tokens(2, 7)
    cached = model.generate(ids, **GREEDY, **WITH_LOGITS)
    mask = {} if level == "token" else {"router_mask": prompt_mask(cached.sequences, 7)}
    expected = model(cached.sequences, **mask).logits[:, 6:-1]
    torch.testing.assert_close(torch.stack(cached.logits, 1), expected, **CLOSE)
    for more in ({}, {"num_beams": 3}):
        rows = [ids[0], ids[1, 3:]]
        batch = model.generate(**left_padded(rows), **GREEDY, **more)
        assert torch.equal(
            model.generate(**left_padded(rows), use_cache=False, **GREEDY, **more), batch
        )
        for i, row in enumerate(rows):
            alone = model.generate(row[None], **GREEDY, **more)
            assert torch.equal(batch[i, 7:], alone[0, len(row) :])


@pytest.mark.parametrize("kind", [True, False], ids=["reentrant", "non_reentrant"])
@pytest.mark.parametrize("level", LEVELS)
def test_checkpointing_has_the_gradients_of_none(level, kind):
    ids = tokens()
    labels = ids.masked_fill(prompt_mask(ids, 4), -100)
    model = causal(router="hashed", routing_level=level)
    expected = gradients(model, input_ids=ids, labels=labels)
    assert all(bool(grad.any()) for grad in expected.values())
    model.gradient_checkpointing_enable({"use_reentrant": kind})
    assert_bits(gradients(model, input_ids=ids, labels=labels), expected)
    assert not list(model.moelora.routers.parameters())


def test_what_it_cannot_read_is_refused():
    model = causal(router="hashed")
    embeds = model.get_input_embeddings()(tokens())
    with pytest.raises(ValueError, match=r"inputs_embeds alone: pass input_ids"):
        model(inputs_embeds=embeds)
    with model.use_experts("expert_1"):
        model(inputs_embeds=embeds)
    with pytest.raises(ValueError, match="has nothing to learn"):
        model(tokens(), expert_targets=torch.tensor([0, 1]))
    with pytest.raises(RuntimeError, match="call the model itself"):
        model.model.layers[0].self_attn.q_proj(embeds)
    head = causal(router="hashed", target_modules=["lm_head"])
    with pytest.raises(ValueError, match="leave that linear out of target_modules"):
        head(tokens(), logits_to_keep=1)


@pytest.mark.parametrize(
    "field",
    [
        {"router_pooling": "last", "routing_level": "sequence"},
        {"router_input_norm": True},
        {"norm_topk_prob": False},
        {"router_jitter_noise": 0.1},
        {"router_bias_update_rate": 0.01},
    ],
)
def test_fields_that_would_do_nothing_are_refused(field):
    with pytest.raises(ValueError, match="does nothing with router='hashed'"):
        MoeLoraConfig(router="hashed", **field)


def test_a_checkpoint_keeps_the_table_of_experts_that_came_and_went(tmp_path):
    model = causal(router="hashed", router_options={"seed": 3})
    model.remove_expert("expert_1")
    model.add_expert("law", copy_of="expert_2")
    before = model.route(input_ids=tokens()).routing
    model.save_pretrained(tmp_path)
    again = MoeLoraForCausalLM.from_pretrained(tmp_path, base=causal_base()).eval()
    for one, two in zip(before, again.route(input_ids=tokens()).routing):
        assert torch.equal(one.expert_ids, two.expert_ids)
    with pytest.raises(ValueError, match="seed cannot be changed"):
        MoeLoraForCausalLM.from_pretrained(tmp_path, base=causal_base(), router_options={"seed": 4})
