"""The README's calculation of 10 000 experts on a 70B base, from the parameters of one layer."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from moelora import MoeLoraConfig, MoeLoraForCausalLM

README = Path(__file__).resolve().parents[1] / "README.md"
LAYERS = 80
EXPERTS = 10_000
# What such a GPU's bus (PCIe 5.0, 16 lanes) carries in a second.
BUS = 64e9
# Of the whole base, beside its layers: embeddings, norm and head.
VOCABULARY = 32_000


def layer(experts: int, scope: str = "site"):
    """One decoder layer of the base with a mixture, without values."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=1,
        num_attention_heads=64,
        num_key_value_heads=8,
        head_dim=128,
    )
    with torch.device("meta"):
        base = LlamaForCausalLM(config)
    mixture = MoeLoraConfig(
        num_experts=experts,
        r=8,
        num_experts_per_tok=2,
        target_modules="all-linear",
        router_scope=scope,
    )
    return MoeLoraForCausalLM.from_base(base, mixture)


def in_routers(model) -> int:
    """The parameters of its routers."""
    return sum(p.numel() for router in model.moelora.router_list for p in router.parameters())


def calculated() -> list[str]:
    """The rows of the table."""
    few = layer(16)
    own = sum(p.numel() for factor in few.moelora.factors() for p in factor.parameters())
    in_layer = sum(
        p.numel() for n, p in few.model.layers[0].named_parameters() if "moelora" not in n
    )
    in_base = in_layer * LAYERS + sum(
        p.numel() for n, p in few.named_parameters() if ".layers." not in n
    )
    hidden = few.config.hidden_size
    expert = own // 16 * LAYERS
    site_routers = in_routers(few) // 16 * EXPERTS * LAYERS
    model_router = in_routers(layer(16, "model")) // 16 * EXPERTS
    of_all = 4 * expert * EXPERTS
    prompt = 2 * 4 * expert
    return [
        f"| one expert | {expert / 1e6:.1f} M parameters, {4 * expert / 1e6:.0f} MB in fp32 |",
        f"| all 10 000 | {expert * EXPERTS / 1e12:.2f} T parameters, {of_all / 1e12:.2f} TB; "
        f"the base in bf16 {2 * in_base / 1e9:.0f} GB |",
        "| a router for each site; one for the whole model | "
        f"{4 * site_routers / 1e9:.0f} GB; {4 * model_router / 1e9:.2f} GB |",
        "| resident, experts on their layer's GPU (`device_map`): 80 GPUs, 40 GPUs | "
        f"{of_all / 80 / 1e9:.1f} GB a GPU; {of_all / 40 / 1e9:.1f} GB a GPU, beside "
        f"{2 * in_layer / 1e9:.1f} and {4 * in_layer / 1e9:.1f} GB of base |",
        f"| the same, from GPU to GPU | {2 * hidden / 1e3:.0f} KB a token |",
        "| FSDP over 80 GPUs, experts gathered with their layer: received a GPU and forward pass "
        f"| {of_all * 79 / 80 / 1e12:.2f} TB |",
        "| offloaded, 64 resident a site, 8 GPUs of 10 layers each | "
        f"{64 * 4 * expert / 8 / 1e9:.1f} GB a GPU; {of_all / 1e12:.2f} TB on the host or in the "
        "file |",
        '| a prompt whose two experts are not resident, `routing_level="sequence"`, the same 8 '
        f"GPUs | {prompt / 1e6:.0f} MB in all, {prompt / 8 / 1e6:.0f} MB a GPU: "
        f"{1e3 * prompt / 8 / BUS:.1f} ms each at 64 GB/s |",
        "| trained with AdamW in fp32 (weights, gradients, two moments) | "
        f"{4 * of_all / 1e12:.1f} TB |",
    ]


def test_the_calculation_in_the_README():
    lines = README.read_text(encoding="utf-8").splitlines()
    first = lines.index("<!-- calculation -->") + 3
    rows = calculated()
    assert lines[first : first + len(rows)] == rows


def test_an_expert_is_as_large_as_its_linears_say():
    inputs = {8192: ("q", "k", "v", "o", "gate", "up"), 28672: ("down",)}
    outputs = {8192: ("q", "o", "down"), 1024: ("k", "v"), 28672: ("gate", "up")}
    widths = sum(
        width * len(names) for sizes in (inputs, outputs) for width, names in sizes.items()
    )
    model = layer(16)
    own = sum(p.numel() for factor in model.moelora.factors() for p in factor.parameters())
    assert own == 16 * 8 * widths
