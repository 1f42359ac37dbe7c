"""Mixtures on the tiny bases whose experts do something, and what tests read out of them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import transformers
from bases import CAUSAL, UNHEARD_OF, VOCAB, causal_base, classifier_base
from packaging.version import Version
from torch import Tensor, nn
from transformers import PreTrainedModel

from moelora import (
    ROUTERS,
    MoeLoraConfig,
    MoeLoraForCausalLM,
    MoeLoraForSequenceClassification,
    Router,
)
from moelora.config_checks import ROUTER_SCOPES, ROUTING_LEVELS
from moelora.injection.inject import put_into

SCOPES = ROUTER_SCOPES
LEVELS = ROUTING_LEVELS
ALL_CAUSAL = [*CAUSAL, *UNHEARD_OF]
# A router that blends the token's and the prompt's gate routes tokens, and is refused elsewhere.
ROUTERS_AT_LEVELS = [
    (router, level)
    for router in sorted(ROUTERS)
    for level in LEVELS
    if level == "token" or not ROUTERS[router].reads_prompt
]
# Those that make one vector of a prompt at sequence level: the others read no hidden states there.
POOLING_ROUTERS = [
    router
    for router in sorted(ROUTERS)
    if ROUTERS[router].reads == "hidden_states" and not ROUTERS[router].reads_prompt
]
FIELDS = {
    "num_experts": 4,
    "r": 3,
    "lora_alpha": 6,
    "num_experts_per_tok": 2,
    "target_modules": "all-linear",
}
# The router losses off, so that what a router learns comes through its weights.
NO_ROUTER_LOSS = {"router_aux_loss_coef": 0.0, "router_z_loss_coef": 0.0}
# What a kind of router refuses (tests/routers/test_refusals.py), so tests over all routers make it
# without that.
REFUSED = {
    "soft": {"num_experts_per_tok"},
    "top_p": {"null_expert"},
    "threshold": {"null_expert"},
    "sparsegen": {"null_expert"},
    "random": {"router_pooling", "router_input_norm", "router_jitter_noise", "norm_topk_prob"},
}


def suited(**fields: Any) -> dict[str, Any]:
    """These fields of a configuration without those that its router refuses."""
    refused = REFUSED.get(fields.get("router", "top_k"), set())
    return {name: value for name, value in fields.items() if name not in refused}


# The probe is most of the time that making a tiny mixture takes, and answers the same for the same
# configurations.
_FOUND: dict[tuple, dict[str, Any]] = {}


def into(base: PreTrainedModel, active: bool = True, probe: bool = False, **fields: Any) -> Any:
    """A mixture put into `base`, in eval mode; `active` gives every B values, else the mixture is
    new.

    probe: find the sites in this very base, as `from_base` does; else a base of this kind was
    probed once.
    """
    classifier = type(base).__name__.endswith("ForSequenceClassification")
    public = MoeLoraForSequenceClassification if classifier else MoeLoraForCausalLM
    config = MoeLoraConfig(**{**suited(**FIELDS, router=fields.get("router", "top_k")), **fields})
    key = (public, base.config.to_json_string(), config.router_scope, config.router_layer)
    key += (str(config.target_modules), str(config.layers_to_transform))
    key += (str(config.target_blocks), config.expert_placement)
    torch.manual_seed(1)
    if probe or key not in _FOUND:
        model = public.from_base(base, config)
        found = model.moelora_config
        _FOUND[key] = {"sites": found.sites, "block_sizes": found.block_sizes}
    else:
        vars(config).update(copy.deepcopy(_FOUND[key]))
        model = put_into(base, config, public)
    return activate(model.eval()) if active else model.eval()


def causal(name: str = "llama", active: bool = True, **fields: Any) -> Any:
    """A mixture in the tiny causal language model `name`."""
    return into(causal_base(name), active, **fields)


def classifier(name: str = "bert", active: bool = True, **fields: Any) -> Any:
    """A mixture in the tiny sequence classifier `name`."""
    return into(classifier_base(name), active, **fields)


@torch.no_grad()
def activate(model: Any, seed: int = 2, std: float = 0.3) -> Any:
    """Draw every B, so that which experts act shows in the logits."""
    generator = torch.Generator().manual_seed(seed)
    for site in model.moelora.sites.values():
        for lora_B in site.lora_B:
            lora_B.fill(torch.randn(lora_B.stacked().shape, generator=generator) * std)
    return model


def tokens(batch: int = 2, length: int = 10, seed: int = 3) -> Tensor:
    """Random token ids `[batch, length]`, none of them special."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCAB, (batch, length), generator=generator)


def told(model: Any, ids: Tensor, seed: int = 5) -> dict[str, Tensor]:
    """What a model's forward needs beside `ids`: an outside context, if its routers read one."""
    router = model.moelora.router_list[0]
    if router.reads != "context":
        return {}
    generator = torch.Generator().manual_seed(seed)
    return {"router_context": torch.randn(len(ids), router.in_features, generator=generator)}


def rows_for(router: Router, count: int) -> Tensor:
    """Random rows in the form that a router reads: hidden states, token ids or contexts."""
    if router.reads == "input_ids":
        return torch.randint(0, 10_000, (count,))
    return torch.randn(count, router.in_features)


def prompt_mask(ids: Tensor, length: int) -> Tensor:
    """True on the first `length` tokens of each row."""
    return (torch.arange(ids.shape[1]) < length).expand_as(ids)


def left_padded(rows: list[Tensor]) -> dict[str, Tensor]:
    """Rows of different lengths as one batch, padded on the left with token 0."""
    width = max(len(row) for row in rows)
    pad = [(width - len(row), 0) for row in rows]
    return {
        "input_ids": torch.stack([nn.functional.pad(row, p) for row, p in zip(rows, pad)]),
        "attention_mask": torch.stack(
            [nn.functional.pad(torch.ones_like(r), p) for r, p in zip(rows, pad)]
        ),
    }


def adapted(model: Any) -> dict[str, tuple[Any, int]]:
    """Each adapted linear's site and its number there, by the linear's name."""
    return {
        name: (site, i)
        for site in model.moelora.sites.values()
        for i, name in enumerate(site.names)
    }


def own_parameters(model: Any) -> dict[str, nn.Parameter]:
    """The mixture's parameters, wherever they lie in the model, by their names in it."""
    return {name: p for name, p in model.named_parameters() if model.moelora.owns(name)}


def refused_by_old_transformers(scope: str, reentrant: bool | None) -> Any:
    """For a training step: holds that it is refused, and gives that refusal, where transformers
    checkpoints a layer with its hooks inside, as before 5.23; else gives None.
    """
    if scope == "model" and reentrant and Version(transformers.__version__) < Version("5.23"):
        return pytest.raises(ValueError, match="upgrade transformers")
    return nullcontext()


def expert_parameters(model: Any) -> dict[str, nn.Parameter]:
    """Those of the experts alone."""
    return {name: p for name, p in own_parameters(model).items() if ".lora_" in name}


def factors(
    model: Any, expert: int, of: Callable[[Tensor], Tensor] = Tensor.detach
) -> dict[str, tuple[Tensor, Tensor]]:
    """One expert's A `[r, d_in]` and B `[d_out, r]` by the linear's name, or what `of` makes of the
    parameter that they are rows of (nothing being frozen).
    """
    rows = {}
    for name, (site, i) in adapted(model).items():
        A, B = site.lora_A, site.lora_B[i]
        start_a = sum(A.blocks[: i * model.moelora.num_experts + expert])
        start_b = sum(B.blocks[:expert])
        r = B.blocks[expert]
        rows[name] = (of(A.weight)[start_a : start_a + r], of(B.weight)[start_b : start_b + r].T)
    return rows
