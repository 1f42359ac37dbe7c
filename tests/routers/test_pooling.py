"""What a sequence router reads: mean, last token or attention, with or without the input norm, and
the small MLP.
"""

from __future__ import annotations

import pytest
import torch
from bases import causal_base
from core.mixtures import causal, left_padded, prompt_mask, tokens
from torch import Tensor

from moelora import ROUTERS, MoeLoraConfig, MoeLoraForCausalLM
from moelora.config_checks import ROUTER_POOLINGS

GATE = dict(routing_level="sequence", router_scope="model", router_layer=0, num_experts_per_tok=1)


def gate(pooling: str = "mean", **fields):
    """A mixture whose one router reads the prompt's embeddings, with a query that prefers some
    tokens.
    """
    model = causal(**{**GATE, "router_pooling": pooling, **fields})
    if pooling == "attention":
        (router,) = model.moelora.routers.values()
        generator = torch.Generator().manual_seed(7)
        with torch.no_grad():
            router.pool_query.copy_(3 * torch.randn(router.pool_query.shape, generator=generator))
    return model


def by_hand(model, ids: Tensor, norm: bool) -> Tensor:
    """The router's input for one prompt `[S]`, written out token by token."""
    (router,) = model.moelora.routers.values()
    x = model.get_input_embeddings()(ids).double()
    if norm:
        x = x / x.square().mean(-1, keepdim=True).sqrt()
    if router.pooling == "mean":
        pooled = sum(x) / len(x)
    elif router.pooling == "last":
        pooled = x[-1]
    else:
        scores = [float(token @ router.pool_query.double()) / len(token) ** 0.5 for token in x]
        weights = torch.tensor(scores, dtype=torch.float64).softmax(0)
        pooled = sum(w * token for w, token in zip(weights, x))
    return pooled / pooled.square().mean().sqrt() if norm else pooled


@torch.no_grad()
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("pooling", ROUTER_POOLINGS)
def test_the_router_reads_the_prompt_as_written_by_hand(pooling, norm):
    model = gate(pooling, router_input_norm=norm)
    ids = tokens(3, 8)
    mask = prompt_mask(ids, 5)
    (routing,) = model(ids, router_mask=mask, output_expert_routing=True).expert_routing
    (router,) = model.moelora.routers.values()
    for row, logits in zip(ids, routing.logits):
        expected = router.weight.double() @ by_hand(model, row[:5], norm)
        torch.testing.assert_close(logits.double(), expected, rtol=1e-5, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("pooling", ROUTER_POOLINGS)
def test_padding_on_either_side_changes_nothing(pooling, side):
    model = gate(pooling)
    rows = [tokens(1, n, seed=n)[0] for n in (4, 9, 6)]
    batch = left_padded(rows)
    if side == "right":
        batch = {
            name: torch.stack([r.roll(-(9 - len(row))) for r, row in zip(t, rows)])
            for name, t in batch.items()
        }
    together = model(**batch, output_expert_routing=True).expert_routing[0].logits
    for row, logits in zip(rows, together):
        alone = model(row[None], output_expert_routing=True).expert_routing[0].logits[0]
        torch.testing.assert_close(logits, alone, rtol=1e-5, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("pooling", ROUTER_POOLINGS)
def test_generating_keeps_the_prompts_routing(pooling):
    model = gate(pooling)
    batch = left_padded([tokens(1, n, seed=n)[0] for n in (3, 6)])
    out = model.generate(**batch, max_new_tokens=5, do_sample=False)
    prompt = batch["input_ids"].shape[1]
    mask = torch.nn.functional.pad(batch["attention_mask"], (0, out.shape[1] - prompt), value=1)
    whole = model(out, attention_mask=mask, router_mask=batch["attention_mask"].bool()).logits
    assert torch.equal(whole[:, prompt - 1 : -1].argmax(-1), out[:, prompt:])


@torch.no_grad()
@pytest.mark.parametrize("pooling", ROUTER_POOLINGS)
def test_no_logit_of_the_answer_depends_on_a_later_token(pooling):
    model = gate(pooling)
    ids = tokens(2, 8)
    other = ids.clone()
    other[:, 6] = (other[:, 6] + 1) % 60 + 3
    mask = prompt_mask(ids, 4)
    assert torch.equal(
        model(ids, router_mask=mask).logits[:, :6], model(other, router_mask=mask).logits[:, :6]
    )


@pytest.mark.parametrize("router", sorted(set(ROUTERS) & {"top_k", "mlp", "arrow"}))
@pytest.mark.parametrize("scope", ["site", "model"])
def test_everything_that_attention_adds_takes_gradients(router, scope):
    model = causal(
        **{**GATE, "router_scope": scope, "router_pooling": "attention", "router": router}
    ).train()
    labels = tokens().masked_fill(prompt_mask(tokens(), 4), -100)
    model(tokens(), labels=labels, expert_targets=torch.tensor([0, 1])).loss.backward()
    for name, parameter in model.moelora.routers.named_parameters():
        assert parameter.grad is not None and bool(parameter.grad.any()), name


def test_a_query_of_zeros_is_the_mean():
    ids = tokens()
    mean = causal(**GATE)
    attention = causal(**GATE, router_pooling="attention")
    attention.moelora.routers.load_state_dict(mean.moelora.routers.state_dict(), strict=False)
    torch.testing.assert_close(attention(ids).logits, mean(ids).logits, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_the_input_norm_makes_the_scale_of_the_input_nothing():
    config = MoeLoraConfig(num_experts=4, router_input_norm=True)
    router = ROUTERS["top_k"](config, 16)
    x = torch.randn(5, 16)
    torch.testing.assert_close(router(x).logits, router(1000 * x).logits)
    assert not torch.allclose(
        ROUTERS["top_k"](MoeLoraConfig(num_experts=4), 16)(x).logits, router(1000 * x).logits
    )
    assert bool(router(torch.zeros(1, 16)).logits.isfinite().all()), "padding has no direction"


@torch.no_grad()
def test_what_all_experts_share_stays_when_experts_come_and_go():
    # As many inputs and hidden units as experts: a row for each by their shape, but not by what
    # they are.
    config = MoeLoraConfig(
        num_experts=8,
        routing_level="sequence",
        router_pooling="attention",
        router="mlp",
        router_options={"hidden_size": 8},
    )
    router = ROUTERS["mlp"](config, 8)
    before = {name: p.clone() for name, p in router.named_parameters()}
    router.resize([7, None, 0])
    assert torch.equal(
        router.weight,
        torch.stack([before["weight"][7], before["weight"][[7, 0]].mean(0), before["weight"][0]]),
    )
    for name in ("pool_query", "hidden_weight", "hidden_bias"):
        assert torch.equal(router.get_parameter(name), before[name])


@torch.no_grad()
@pytest.mark.parametrize("pooling", ROUTER_POOLINGS)
def test_a_checkpoint_has_all_of_it(pooling, tmp_path):
    fields = {
        "router": "mlp",
        "router_options": {"hidden_size": 5},
        "router_input_norm": True,
        "null_expert": True,
    }
    model = gate(pooling, **fields)
    model.save_pretrained(tmp_path)
    again = MoeLoraForCausalLM.from_pretrained(str(tmp_path), base=causal_base()).eval()
    assert torch.equal(model(tokens()).logits, again(tokens()).logits)
    assert {name: getattr(again.moelora_config, name) for name in fields} == fields
    assert again.moelora_config.router_pooling == pooling
