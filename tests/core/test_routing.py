"""What a site computes, written by hand; who gets a gradient; fp32 inside; own routers."""

from __future__ import annotations

import pytest
import torch
from bases import CLASSIFIERS, causal_base
from core.mixtures import (
    ALL_CAUSAL,
    LEVELS,
    NO_ROUTER_LOSS,
    SCOPES,
    adapted,
    causal,
    classifier,
    factors,
    into,
    left_padded,
    tokens,
    told,
)
from torch import nn

from moelora import ROUTERS, MoeLoraForCausalLM, Router, Routing, register_router
from moelora.injection.modules import decoder_layer

MIXED = {"num_experts": 4, "r": [1, 2, 3, 6], "lora_alpha": [2, 8, 3, 6]}


def _captured(model, inputs):
    """What each linear read and put out, and what each decoder layer read, in one forward pass."""
    read, written = {}, {}
    handles = []
    for name in adapted(model):
        module = model.get_submodule(name)
        handles.append(
            module.register_forward_hook(lambda m, a, out, n=name: written.update({n: out.clone()}))
        )
        handles.append(
            module.register_forward_pre_hook(lambda m, a, n=name: read.update({n: a[0].clone()}))
        )
        layer = decoder_layer(model, name)
        handles.append(
            model.get_submodule(layer).register_forward_pre_hook(
                lambda m, a, k, n=layer: read.update(
                    {n: (a[0] if a else k["hidden_states"]).clone()}
                ),
                with_kwargs=True,
            )
        )
    with torch.no_grad():
        model(**inputs)
    for handle in handles:
        handle.remove()
    return read, written


def _frozen_linear(module, x):
    weight = module.weight if isinstance(module, nn.Linear) else module.weight.T
    return nn.functional.linear(x, weight, module.bias)


def _choice(model, router, row):
    """[(expert, weight)] of one row: softmax over all, the k largest, divided by their sum where k
    > 1.
    """
    config = model.moelora_config
    probabilities = (router.weight.to(row.dtype) @ row).softmax(0).tolist()
    ranking = sorted(range(len(probabilities)), key=lambda e: -probabilities[e])[
        : config.num_experts_per_tok
    ]
    normed = config.norm_topk_prob and len(ranking) > 1
    total = sum(probabilities[e] for e in ranking) if normed else 1.0
    return [(e, probabilities[e] / total) for e in ranking]


@torch.no_grad()
def _by_hand(model, name, read, mask):
    """`name`'s output, token after token and expert after expert."""
    config, (site, _) = model.moelora_config, adapted(model)[name]
    module, x = model.get_submodule(name), read[name]
    routed = {"layer": site.layer, "model": decoder_layer(model, next(iter(adapted(model))))}
    h = read[routed.get(config.router_scope, name)]
    router = model.moelora.router_list[site.router_index]
    if config.router_scope == "layer":
        router = model.moelora.routers[site.layer.replace(".", "-")]
    ab = [factors(model, e)[name] for e in range(config.num_experts)]
    batch, length = mask.shape
    x, h = x.reshape(batch, length, -1), h.reshape(batch, length, -1)
    y = _frozen_linear(module, x)
    for b in range(batch):
        for t in range(length):
            row = h[b, t] if config.routing_level == "token" else h[b][mask[b]].mean(0)
            for e, weight in _choice(model, router, row):
                a, b_matrix = ab[e]
                y[b, t] += weight * config.scaling[e] * (b_matrix @ (a @ x[b, t]))
    return y


def _assert_by_hand(model):
    inputs = left_padded([tokens(1, 5)[0], tokens(1, 4, seed=4)[0]])
    read, written = _captured(model, inputs)
    for name in adapted(model):
        expected = _by_hand(model, name, read, inputs["attention_mask"].bool())
        torch.testing.assert_close(
            written[name].view_as(expected), expected, rtol=1e-10, atol=1e-12
        )


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("name", ["llama", "gpt2", "gptj"])
def test_every_linear_puts_out_what_a_loop_over_tokens_and_experts_does(name, scope, level):
    base = causal_base(name).double()
    _assert_by_hand(into(base, **MIXED, router_scope=scope, routing_level=level))


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize(
    "fields",
    [
        {"num_experts_per_tok": 1},
        {"num_experts_per_tok": 3, "norm_topk_prob": False},
        {"num_experts_per_tok": 4},
        {"num_experts": 40, "num_experts_per_tok": 2, "use_rslora": True},
        # SMoRA (arXiv:2501.15103).
        {"num_experts": 12, "r": 1, "lora_alpha": 1, "num_experts_per_tok": 4},
    ],
    ids=[
        "top-1",
        "top-3 not renormalised",
        "all experts",
        "many experts: the grouped path",
        "each rank is an expert",
    ],
)
def test_every_choice_of_experts_is_the_loop_too(fields, level):
    _assert_by_hand(into(causal_base(num_hidden_layers=1).double(), routing_level=level, **fields))


def _train(model):
    """One training forward and backward; the first tokens of each row are prompt."""
    ids = tokens(3, 9)
    labels = ids.clone()
    labels[:, :4] = -100
    model.train()
    labels = labels if not model.is_classifier else torch.tensor([0, 1, 2])
    loss = model(ids, labels=labels, **told(model, ids)).loss
    loss.backward()
    return loss


def _assert_all_trainable_get_gradients(model):
    _train(model)
    trainable = {n: p for n, p in model.named_parameters() if p.requires_grad}
    idle = [n for n, p in trainable.items() if p.grad is None or not bool(p.grad.any())]
    assert not idle
    assert all(p.grad is None for n, p in model.named_parameters() if n not in trainable)
    return trainable


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("name", ALL_CAUSAL)
def test_every_trainable_parameter_gets_a_gradient(name, scope, level):
    model = causal(name, router_scope=scope, routing_level=level, **NO_ROUTER_LOSS)
    trainable = _assert_all_trainable_get_gradients(model)
    assert all(model.moelora.owns(n) for n in trainable), "only experts and routers train"


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("name", CLASSIFIERS)
def test_every_trainable_parameter_of_a_classifier_gets_a_gradient(name, scope, level):
    model = classifier(name, router_scope=scope, routing_level=level, **NO_ROUTER_LOSS)
    trainable = _assert_all_trainable_get_gradients(model)
    heads = {n for n in trainable if not model.moelora.owns(n)}
    assert heads and heads <= {"classifier.weight", "classifier.bias", "score.weight"}, (
        "its head trains too"
    )


# "soft" always uses all experts; "random" and "hashed" learn nothing.
@pytest.mark.parametrize("router", sorted(set(ROUTERS) - {"soft", "random", "hashed"}))
@pytest.mark.parametrize("norm", [True, False])
def test_one_expert_a_token_still_teaches_the_router(router, norm):
    model = causal(num_experts_per_tok=1, norm_topk_prob=norm, router=router, **NO_ROUTER_LOSS)
    _train(model)
    for parameter in model.moelora.routers.parameters():
        assert parameter.grad.abs().max() > 1e-6


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("autocast", [False, True], ids=["bf16 base", "autocast"])
def test_routing_is_fp32_inside(autocast, level):
    base = causal_base() if autocast else causal_base().to(torch.bfloat16)
    model = into(base, routing_level=level)
    read = []
    router = model.moelora.router_list[0]
    router.register_forward_pre_hook(lambda m, a: read.append(a[0].float()))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast), torch.no_grad():
        routing = model(tokens(), output_expert_routing=True).expert_routing
    assert {t.dtype for r in routing for t in (r.logits, r.expert_weights)} == {torch.float32}
    rows = read[0].mean(1) if level == "sequence" else read[0]
    expected = rows @ router.weight.T
    torch.testing.assert_close(routing[0].logits, expected.detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("scope", SCOPES)
def test_the_output_holds_one_routing_a_router(scope, level):
    model = causal(router_scope=scope, routing_level=level)
    counts = {"projection": 14, "site": 8, "layer": 2, "model": 1}
    routing = model(tokens(2, 10), output_expert_routing=True).expert_routing
    assert len(routing) == len(model.moelora.routers) == counts[scope]
    rows = 20 if level == "token" else 2
    assert all(r.logits.shape == (rows, 4) and r.expert_ids.shape == (rows, 2) for r in routing)


class SparseRouter(Router):
    """A sigmoid for each expert; slots below `bar` stay empty."""

    bar = 0.7

    def __init__(self, config, in_features):
        super().__init__(config, in_features)
        self.directions = nn.Parameter(torch.randn(config.num_experts, in_features))

    def score(self, x):
        return nn.functional.linear(nn.functional.normalize(x, dim=-1), self.directions.to(x.dtype))

    def select(self, x, logits, selection_bias):
        weights, ids = logits.sigmoid().topk(self.num_experts_per_tok, dim=-1)
        return Routing(logits, ids.masked_fill(weights < self.bar, -1), weights)


class EmptyRouter(SparseRouter):
    bar = 2.0


@pytest.fixture
def own_routers():
    register_router("sparse")(SparseRouter)
    register_router("empty")(EmptyRouter)
    yield
    del ROUTERS["sparse"], ROUTERS["empty"]


@pytest.mark.parametrize("level", LEVELS)
def test_a_router_of_ones_own_trains_generates_and_reloads(own_routers, level, tmp_path):
    model = causal(router="sparse", routing_level=level, **NO_ROUTER_LOSS)
    _train(model)
    assert all(bool(p.grad.any()) for p in model.moelora.routers.parameters())
    model.eval()
    outputs = model(tokens(), output_expert_routing=True)
    empty = torch.cat([r.expert_ids.reshape(-1) for r in outputs.expert_routing]) == -1
    assert 0 < int(empty.sum()) < empty.numel(), "some slots are empty, and some are not"
    settings = {"max_new_tokens": 4, "do_sample": False}
    assert torch.equal(
        model.generate(tokens(), **settings), model.generate(tokens(), use_cache=False, **settings)
    )
    model.save_pretrained(tmp_path)
    loaded = MoeLoraForCausalLM.from_pretrained(tmp_path, base=causal_base())
    assert torch.equal(loaded(tokens()).logits, outputs.logits)


@pytest.mark.parametrize("level", LEVELS)
def test_where_no_expert_is_chosen_the_model_is_its_base(own_routers, level):
    base = causal_base()
    expected = base(tokens()).logits
    model = into(base, router="empty", routing_level=level)
    assert torch.equal(model(tokens()).logits, expected)


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_padding_has_no_say_in_a_sequence_s_routing(name):
    model = classifier(name, routing_level="sequence")
    row = tokens(1, 6)
    padded = {
        "input_ids": nn.functional.pad(row, (0, 3)),
        "attention_mask": nn.functional.pad(torch.ones_like(row), (0, 3)),
    }
    alone = model(row, attention_mask=torch.ones_like(row), output_expert_routing=True)
    together = model(**padded, output_expert_routing=True)
    torch.testing.assert_close(together.logits, alone.logits, rtol=1e-5, atol=1e-6)
    for a, b in zip(alone.expert_routing, together.expert_routing):
        torch.testing.assert_close(a.logits, b.logits, rtol=1e-5, atol=1e-6)
