"""Experts on the host, of which a few are resident: the outputs are those with all resident."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import accelerate
import pytest
import torch
from bases import causal_base
from core.mixtures import LEVELS, ROUTERS_AT_LEVELS, SCOPES, causal, classifier, into, tokens, told

from moelora import MoeLoraConfig, MoeLoraForCausalLM

MANY = {"num_experts": 12, "num_experts_per_tok": 2}
# Sums are taken in another order where a batch is computed in parts.
TOLERANCE = 2e-5
# Of each kind its fields, and whether the same kernels run with all experts and with few of them:
# not where ranks differ, which slots fill up to one rank.
KINDS = {
    "null expert": ({"null_expert": True}, True),
    "shared experts": ({"num_shared_experts": 1}, True),
    "ranks": ({"r": [1, 2, 3, 4] * 3, "lora_alpha": [float(e + 1) for e in range(12)]}, False),
    "scaling": ({"lora_alpha": [float(e + 1) for e in range(12)]}, True),
    "rank pattern": ({"rank_pattern": {"q_proj": 5, "down_proj": 1}}, True),
    "layers": ({"experts_per_layer": [4, 12]}, False),
    "shared A": ({"share_lora_A": True}, True),
    "bottleneck": ({"expert_activation": "gelu"}, True),
    "series": ({"expert_placement": "series", "target_modules": ["o_proj", "down_proj"]}, True),
    "blocks": ({"target_modules": None, "target_blocks": ["mlp"]}, True),
}


def same(one, other, is_exact=True):
    if is_exact:
        assert torch.equal(one, other)
    else:
        torch.testing.assert_close(one, other, rtol=TOLERANCE, atol=TOLERANCE)


@torch.no_grad()
def check(model, residents=(12, 5, 1), is_exact=True):
    """The logits with all experts, and offloaded in slots that suffice, and in fewer."""

    def logits():
        inputs = [tokens(2, 6), tokens(3, 20, seed=5), tokens(1, 1)]
        return [model(ids, **told(model, ids)).logits for ids in inputs]

    expected = logits()
    for resident in residents:
        model.offload_experts(resident=resident)
        for one, other in zip(logits(), expected, strict=True):
            same(one, other, is_exact and resident == 12)
    model.onload_experts()
    assert all(torch.equal(one, other) for one, other in zip(logits(), expected))


@torch.no_grad()
def test_experts_come_back_where_accelerate_brings_the_base():
    base = causal_base()
    accelerate.cpu_offload(base, torch.device("cpu"))
    config = MoeLoraConfig(**MANY, r=2, target_modules="all-linear")
    model = MoeLoraForCausalLM.from_base(base, config).eval()
    for factor in model.moelora.factors():
        factor.weight.normal_()
    ids = tokens()
    expected = model(ids).logits
    model.offload_experts(resident=12)
    model.onload_experts()
    assert {factor.weight.device.type for factor in model.moelora.factors()} == {"cpu"}
    assert torch.equal(model(ids).logits, expected)


@pytest.mark.parametrize(("router", "level"), ROUTERS_AT_LEVELS)
def test_every_router(router, level):
    fields = {k: v for k, v in MANY.items() if k == "num_experts" or router != "soft"}
    model = causal(**fields, router=router, routing_level=level)
    # Those two choose all experts, which with all of them resident is one product.
    check(model, residents=(12, 5), is_exact=router not in ("soft", "random"))


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("scope", SCOPES)
def test_every_scope(scope, level):
    model = causal(**MANY, router_scope=scope, routing_level=level)
    check(model)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_expert(kind, level):
    fields, is_exact = KINDS[kind]
    more = {"num_experts_per_tok": 1} if "num_shared_experts" in fields else {}
    model = causal(**{**MANY, **fields, **more}, routing_level=level)
    check(model, is_exact=is_exact)


def test_few_experts_that_a_dense_product_would_compute():
    model = causal(num_experts=4)
    ids = tokens(3, 20)
    with torch.no_grad():
        expected = model(ids).logits
        model.offload_experts(resident=4)
        torch.testing.assert_close(model(ids).logits, expected, rtol=TOLERANCE, atol=TOLERANCE)


def test_frozen_experts():
    model = causal(**MANY)
    model.freeze_experts(model.moelora_config.expert_names[::2])
    check(model)
    model.offload_experts(resident=3)
    with torch.no_grad():
        expected = model(tokens()).logits
        model.unfreeze_experts(model.moelora_config.expert_names)
        model.freeze_experts(model.moelora_config.expert_names[:5])
        assert torch.equal(model(tokens()).logits, expected)


def test_a_classifier():
    model = classifier(**MANY)
    check(model)


@torch.no_grad()
def test_experts_that_are_named():
    model = causal(**MANY)
    ids = tokens(2, 5)
    weights = torch.zeros(2, 12)
    weights[0, 3] = weights[1, 7] = 0.5
    weights[1, 11] = 1.5

    def logits():
        found = [model(ids, expert_weights=weights).logits, model(ids, banned_experts=["expert_1"])]
        found[1] = found[1].logits
        with model.use_experts({"expert_4": 0.5, "expert_9": 2.0}):
            found.append(model(ids).logits)
        with model.use_experts(ban=["expert_0", "expert_5"]):
            found.append(model(ids).logits)
        return found

    expected = logits()
    for resident in (12, 2, 1):
        model.offload_experts(resident=resident)
        for one, other in zip(logits(), expected, strict=True):
            same(one, other, resident == 12)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("scope", ["site", "model"])
def test_generation(scope, level):
    model = causal(**MANY, router_scope=scope, routing_level=level)
    ids = tokens(2, 7)
    padding = torch.ones_like(ids)
    padding[0, :3] = 0
    ways = [{}, {"num_beams": 3}, {"use_cache": False}, {"attention_mask": padding}]

    def generated():
        return [model.generate(ids, max_new_tokens=4, do_sample=False, **way) for way in ways]

    expected = generated()
    for resident in (12, 3):
        model.offload_experts(resident=resident)
        assert all(torch.equal(one, other) for one, other in zip(generated(), expected))


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("resident", [12, 3, 1])
def test_threads_take_turns(resident, level):
    torch.set_num_threads(1)
    model = causal(**MANY, routing_level=level)
    inputs = [tokens(1 + i % 2, 1 + i, seed=i) for i in range(5)]
    with torch.no_grad():
        expected = [model(ids).logits for ids in inputs]
        model.offload_experts(resident=resident)
        alone = [model(ids).logits for ids in inputs]

    @torch.no_grad()
    def work(number):
        return [model(inputs[number]).logits for _ in range(2)]

    with ThreadPoolExecutor(5) as pool:
        for own, others, several in zip(alone, expected, pool.map(work, range(5))):
            # The same bits whoever else has fetched what.
            assert all(torch.equal(logits, own) for logits in several)
            same(own, others, resident == 12)


def poison(model):
    """NaN in every slot that holds no expert, and behind every expert that is not resident."""
    for site in model.moelora.sites.values():
        tier = site.tier
        for bank in tier.banks:
            assert bank.layout.alike
            blocks = bank.rows.view(len(bank.widths), tier.num_slots, -1)
            empty = [slot for slot in range(tier.num_slots) if slot not in tier.expert_in]
            blocks[:, empty] = float("nan")
            home = bank.factor.weight.detach().view(len(bank.widths), 12, -1)
            away = [expert for expert in range(12) if expert not in tier.slot_of]
            home[:, away] = float("nan")


@torch.no_grad()
@pytest.mark.parametrize("batch", [1, 3])
def test_nothing_is_read_but_the_experts_that_were_chosen(batch):
    model = causal(**MANY)
    ids = tokens(batch, 1)
    expected = model(ids).logits
    model.offload_experts(resident=8)
    assert torch.equal(model(ids).logits, expected)
    poison(model)
    # The homes have changed, so everything is fetched again.
    assert torch.equal(model(ids).logits, expected)
    poison(model)
    assert torch.equal(model(ids).logits, expected)


@torch.no_grad()
def test_what_is_counted():
    model = causal(**MANY, num_shared_experts=0, target_modules=["q_proj", "k_proj"])
    ids = tokens(1, 3)
    model.offload_experts(resident=2)
    with model.use_experts(["expert_1", "expert_2"]):
        model(ids)
    report = model.expert_cache_report()
    sites = len(model.moelora.sites)
    r, d, d_q, d_k = 3, 32, 32, 16
    rows = 4 * r * (2 * d + d_q + d_k)
    assert (report.total.hits, report.total.fetched) == (0, 2 * sites)
    assert report.total.bytes_moved == 2 * sites * rows
    assert report.bytes_resident == 2 * sites * rows
    assert report.bytes_offloaded == 12 * sites * rows
    # The one used longest ago goes: 2, as 1 was used once more.
    for names, hits in [(["expert_1"], 1), (["expert_1", "expert_3"], 1), (["expert_2"], 0)]:
        model.expert_cache_report(reset=True)
        with model.use_experts(names):
            model(ids)
        report = model.expert_cache_report()
        assert (report.total.hits, report.total.fetched) == (
            hits * sites,
            (len(names) - hits) * sites,
        )
    assert report.hit_rate == 0.0 and "2 of 12 experts resident" in str(report)
    # More than there is room for: each is fetched for A, and again for each B.
    model.expert_cache_report(reset=True)
    with model.use_experts([f"expert_{e}" for e in range(4, 8)]):
        model(ids)
    assert model.expert_cache_report().total.fetched == 3 * 4 * sites
    assert set(report.by_site) == set(model.moelora.sites)


@torch.no_grad()
def test_experts_are_fetched_ahead_where_the_choice_is_known():
    model = causal(**MANY, router_scope="model", routing_level="sequence")
    model.offload_experts(resident=4)
    seen = []
    first = next(iter(model.moelora.sites.values()))
    last = list(model.moelora.sites.values())[-1]
    shrink = first.tier.shrink
    first.tier.shrink = lambda *args: seen.append(dict(last.tier.slot_of)) or shrink(*args)
    routing = model(tokens(1, 5), output_expert_routing=True).expert_routing
    chosen = set(routing[0].expert_ids.flatten().tolist())
    # Before the first site ran the last one had them.
    assert [set(slots) for slots in seen] == [chosen]
    total = model.expert_cache_report().total
    assert total.fetched == total.prefetched == 2 * len(model.moelora.sites)
    assert total.hits == 0
    model(tokens(1, 5))
    total = model.expert_cache_report().total
    assert (total.hits, total.fetched) == (2 * len(model.moelora.sites),) * 2


def test_compiled():
    torch._dynamo.reset()
    # One linear: tracing takes its time.
    model = into(causal_base(num_hidden_layers=1), **MANY, target_modules=["v_proj"])
    ids = tokens()
    with torch.no_grad():
        model.offload_experts(resident=12)
        expected = model(ids).logits
        compiled = torch.compile(model, backend="eager")
        torch.testing.assert_close(compiled(ids).logits, expected)
        torch.testing.assert_close(compiled(ids).logits, expected)


@pytest.mark.parametrize(
    ("resident", "error"), [(0, ValueError), (-1, ValueError), ("8", TypeError), (2.0, TypeError)]
)
def test_a_wrong_number_is_refused(resident, error, tmp_path):
    model = causal()
    with pytest.raises(error, match="resident"):
        model.offload_experts(resident=resident)
    with pytest.raises(error, match="resident"):
        MoeLoraForCausalLM.from_pretrained(tmp_path, resident_experts=resident)
    with pytest.raises(ValueError, match=r"offload_experts\(resident"):
        model.expert_cache_report()
