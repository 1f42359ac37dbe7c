"""Experts whose rank and scaling differ from linear to linear, as imported adapters have them."""

from __future__ import annotations

import pytest
import torch
from bases import causal_base
from core.mixtures import activate, own_parameters

from moelora import MoeLoraConfig, MoeLoraForCausalLM

INPUT = torch.arange(2 * 6).view(2, 6) % 11 + 3
FIRST = "model.layers.0.self_attn."
RANKS = {
    f"{FIRST}q_proj": [2, 0, 5],
    f"{FIRST}k_proj": [0, 0, 0],
    "model.layers.1.mlp.down_proj": [1, 2, 3],
}
SCALING = {f"{FIRST}q_proj": [0.5, 1.0, 3.0], "model.layers.1.mlp.down_proj": [2.0, 1.0, -1.0]}


@pytest.fixture
def model():
    config = MoeLoraConfig(
        num_experts=3,
        r=4,
        lora_alpha=4,
        target_modules="all-linear",
        expert_ranks=RANKS,
        expert_scaling=SCALING,
    )
    return activate(MoeLoraForCausalLM.from_base(causal_base("llama"), config).eval())


@pytest.mark.parametrize(
    "weights", [{"expert_0": 1.0}, {"expert_1": 0.5, "expert_2": -0.25}], ids=str
)
def test_forced_experts_are_the_base_with_their_products_added(model, weights):
    """y = (W + Σ w s B A) x, linear by linear."""
    with model.use_experts(weights), torch.no_grad():
        forced = model(INPUT).logits
    merged = causal_base("llama").eval()
    merged.load_state_dict(
        {k: v for k, v in model.state_dict().items() if not model.moelora.owns(k)}
    )
    for site in model.moelora.sites.values():
        for i, (lora_B, name) in enumerate(zip(site.lora_B, site.names)):
            ranks = RANKS.get(name, [4] * 3)
            start = sum(sum(RANKS.get(n, [4] * 3)) for n in site.names[:i])
            for expert, weight in ((int(n[-1]), w) for n, w in weights.items()):
                a, b = start + sum(ranks[:expert]), sum(ranks[:expert])
                A = site.lora_A.stacked()[a : a + ranks[expert]]
                B = lora_B.stacked()[b : b + ranks[expert]]
                scale = SCALING.get(name, [1.0] * 3)[expert]
                merged.get_submodule(name).weight.data += (weight * scale * A.T @ B).T.detach()
    with torch.no_grad():
        torch.testing.assert_close(forced, merged(INPUT).logits, rtol=1e-5, atol=1e-5)


def test_every_row_trains_and_a_checkpoint_keeps_it_all(model, tmp_path):
    model.train()
    model(INPUT, labels=INPUT).loss.backward()
    assert all(
        p.grad is not None for p in own_parameters(model).values() if p.requires_grad and p.numel()
    )
    model.eval().save_pretrained(tmp_path)
    again = MoeLoraForCausalLM.from_pretrained(tmp_path, base=causal_base("llama"))
    assert (
        again.moelora_config.expert_ranks == RANKS
        and again.moelora_config.expert_scaling == SCALING
    )
    with torch.no_grad():
        assert torch.equal(again.eval()(INPUT).logits, model(INPUT).logits)
