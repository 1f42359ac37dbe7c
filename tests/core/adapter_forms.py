"""The forms of experts beside LoRA on tiny bases, and the same computed plainly, hook by hook."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from bases import causal_base
from core.mixtures import NO_ROUTER_LOSS, factors, into
from torch import Tensor, nn
from torch.nn import functional

from moelora.placement import ends_of

# Of each architecture of LLM-Adapters (arXiv:2304.01933) the FFN as a place, and what series
# adapters stand behind.
FFN = {"llama": ["mlp"], "bloom": ["mlp"], "opt": ["fc1->fc2"], "gptj": ["mlp"]}
BEHIND = {
    "llama": ["o_proj", "down_proj"],
    "bloom": ["dense", "dense_4h_to_h"],
    "opt": ["out_proj", "fc2"],
    "gptj": ["out_proj", "fc_out"],
}
PHI: dict[Any, Callable[[Tensor], Tensor]] = {
    None: lambda h: h,
    "relu": lambda h: h.clamp(min=0),
    "gelu": lambda h: h * 0.5 * (1 + torch.erf(h / 2**0.5)),
    "silu": lambda h: h / (1 + (-h).exp()),
    "tanh": lambda h: (h.exp() - (-h).exp()) / (h.exp() + (-h).exp()),
}
FORMS = ("bottleneck", "series", "block", "series block", "both")


def form(name: str, kind: str, activation: str | None = "tanh") -> dict[str, Any]:
    """The fields that say where experts are on the base `name`, and their φ."""
    fields: dict[str, Any] = {"expert_activation": activation}
    if kind == "bottleneck":
        return {**fields, "target_modules": "all-linear"}
    if kind == "series":
        return {**fields, "target_modules": BEHIND[name], "expert_placement": "series"}
    if kind == "series block":
        # The output of a span is that of its last linear.
        last = [target.rpartition(">")[2] for target in FFN[name]]
        where = "target_modules" if name == "opt" else "target_blocks"
        return {**fields, "target_modules": None, where: last, "expert_placement": "series"}
    linears = "all-linear" if kind == "both" else None
    return {**fields, "target_modules": linears, "target_blocks": FFN[name]}


def made(name: str, kind: str, activation: str | None = "tanh", **fields: Any) -> Any:
    """A mixture of this form on a tiny base, with experts that do something."""
    base = fields.pop("base", None)
    given = {**form(name, kind, activation), **NO_ROUTER_LOSS, **fields}
    return into(causal_base(name) if base is None else base, **given)


class Plain:
    """A base with the experts of `model` hooked on plainly: one by one, all of it in autograd.

    leaves: by the model's own parameter the copy that takes its gradient here.
    """

    def __init__(self, base: nn.Module, model: Any):
        self.base = base
        self.config = model.moelora_config
        self.leaves: dict[nn.Parameter, Tensor] = {}
        self.read: dict[str, Tensor] = {}
        experts = [factors(model, e, of=self.leaf) for e in range(model.moelora.num_experts)]
        for site in model.moelora.sites.values():
            for name in site.names:
                own = [(*expert[name], s) for expert, s in zip(experts, site.lora_B[0].scaling)]
                self._hook(name, self.leaf(site.router.weight), own)

    def leaf(self, parameter: nn.Parameter) -> Tensor:
        if parameter not in self.leaves:
            self.leaves[parameter] = parameter.detach().clone().requires_grad_()
        return self.leaves[parameter]

    def _hook(self, name: str, router: Tensor, experts: list) -> None:
        first, last = ends_of(name)

        def note(module, args, kwargs):
            self.read[name] = args[0] if args else kwargs["hidden_states"]

        def add(module, args, output):
            x = output if self.config.expert_placement == "series" else self.read.pop(name)
            return output + self._experts(x, router, experts).view(output.shape)

        self.base.get_submodule(first).register_forward_pre_hook(note, with_kwargs=True)
        self.base.get_submodule(last).register_forward_hook(add)

    def _experts(self, x: Tensor, router: Tensor, experts: list) -> Tensor:
        """Σ_e w_e s_e φ(x A_eᵀ) B_e of the top k, their weights' sum 1."""
        x = x.reshape(-1, x.shape[-1])
        probabilities = (x @ router.T).softmax(-1)
        top, ids = probabilities.topk(self.config.num_experts_per_tok)
        gate = torch.zeros_like(probabilities).scatter(1, ids, top / top.sum(-1, keepdim=True))
        phi = PHI[self.config.expert_activation]
        parts = [
            gate[:, e, None] * s * phi(functional.linear(x, A)) @ B.T
            for e, (A, B, s) in enumerate(experts)
        ]
        return torch.stack(parts).sum(0)
