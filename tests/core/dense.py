"""A mixture by the book: one plain matrix product for every expert, linear by linear."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from bases import causal_base
from core.mixtures import adapted, factors, tokens
from torch import Tensor
from training.runs import Gradients


def gate(model: Any, index: int, x: Tensor) -> Tensor:
    """The weight of every expert, `[…, E]`, for what router number `index` (a top_k) reads.

    The softmax over what the layer has, the largest `num_experts_per_tok` over their sum; shared
    experts have the weight 1.
    """
    config = model.moelora_config
    mixture = model.moelora
    if config.routing_level == "sequence":
        x = x.mean(1, keepdim=True)
    logits = x @ mixture.router_list[index].weight.T
    routed = config.num_experts - config.num_shared_experts
    owner = mixture.owners[index]
    layer = getattr(owner, "layer", None) or mixture.router_names[index]
    present = (config.layer_experts or {}).get(layer, list(range(routed)))
    lacking = [e for e in range(routed) if e not in present]
    logits[..., lacking] = -torch.inf
    top = logits.softmax(-1).topk(config.num_experts_per_tok, dim=-1)
    # One expert's weight over itself would always be 1: it keeps its probability.
    norm = top.values.sum(-1, keepdim=True) if config.num_experts_per_tok > 1 else 1.0
    chosen = top.values / norm
    weights = torch.zeros_like(logits).scatter(-1, top.indices, chosen)[..., :routed]
    return torch.cat([weights, weights.new_ones(*x.shape[:-1], config.num_shared_experts)], dim=-1)


def dense_logits(model: Any, ids: Tensor, times: Sequence[Tensor] | None = None) -> Tensor:
    """The logits of a mixture on the tiny llama, computed without any of its code.

    times: by router what each row's weights are multiplied with, `[rows, E]`.
    """
    plain = causal_base()
    experts = range(model.moelora.num_experts)
    own = [factors(model, e, of=lambda parameter: parameter) for e in experts]
    scope = model.moelora_config.router_scope
    shared: dict[str, Tensor] = {}

    def gated(index: int, x: Tensor) -> Tensor:
        weights = gate(model, index, x)
        return weights if times is None else weights * times[index].view(weights.shape)

    def read(index: int):
        def hook(module, args, kwargs):
            shared["gate"] = gated(index, args[0] if args else kwargs["hidden_states"])

        return hook

    def add(name: str, site: Any):
        def hook(module, args, output):
            (x,) = args
            weights = shared["gate"] if scope in ("layer", "model") else None
            weights = gated(site.router_index, x) if weights is None else weights
            for e in experts:
                A, B = own[e][name]
                scaling = model.moelora_config.scaling_of(name)[e]
                output = output + weights[..., e, None] * scaling * (x @ A.T @ B.T)
            return output

        return hook

    if scope in ("layer", "model"):
        for index, name in enumerate(model.moelora.router_names):
            plain.get_submodule(name).register_forward_pre_hook(read(index), with_kwargs=True)
    for name, (site, _) in adapted(model).items():
        plain.get_submodule(name).register_forward_hook(add(name, site))
    return plain(ids).logits


def assert_plain_sum(model: Any, got: Tensor, times: Sequence[Tensor] | None = None) -> None:
    """The logits `got` of a mixture on `tokens()` are those of `dense_logits`, and so are the
    gradients of all that trains.
    """
    expected = dense_logits(model, tokens(), times)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    gradients = learned(model, got)
    for name, gradient in learned(model, expected).items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-4, atol=1e-5)


def learned(model: Any, logits: Tensor) -> Gradients:
    """The gradients of every parameter of the mixture, by a loss on these logits."""
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    generator = torch.Generator().manual_seed(0)
    loss = (logits * torch.randn(logits.shape, generator=generator)).mean()
    gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    assert all(grad is not None for grad in gradients)
    return dict(zip(parameters, gradients))
