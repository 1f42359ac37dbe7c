"""The checks of `MoeLoraConfig`: of single fields as data, of several together as functions."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from .validation import (
    MAX_EXPERTS,
    MAX_RANK,
    MAX_TOTAL_RANK,
    check_by_linear,
    check_choice,
    check_flag,
    check_integer,
    check_number,
    expert_name_problem,
    shown,
    string_list,
)

FORMAT_VERSION = 1
ROUTING_LEVELS = ("token", "sequence")
ROUTER_SCOPES = ("projection", "site", "layer", "model")
ROUTER_POOLINGS = ("mean", "last", "attention")
AUX_LOSS_WINDOWS = ("previous_step", "micro_batch")
# What reports and label mappings call the null expert.
NO_EXPERT = "(base)"


def _check_optional(name: str, value: Any, kind: type = str, word: str = "string") -> None:
    if not isinstance(value, (kind, type(None))):
        raise TypeError(f"{name} is not a {word}, but {shown(value)}.")


_check_share = partial(check_number, low=0.0, high=1.0, open_high=True)
_check_coefficient = partial(check_number, low=0.0, high=math.inf)
# The checks of single fields, as data; those that say more are functions.
FIELD_CHECKS: dict[str, Callable[[str, Any], None]] = {
    "num_experts": partial(check_integer, low=1, high=MAX_EXPERTS),
    "num_experts_per_tok": partial(check_integer, low=1, high=MAX_EXPERTS),
    "router_layer": partial(check_integer, low=0),
    "router_prefix_tokens": partial(check_integer, low=1),
    "format_version": partial(check_integer, low=0, high=FORMAT_VERSION),
    "lora_dropout": _check_share,
    "router_jitter_noise": _check_share,
    "router_aux_loss_coef": _check_coefficient,
    "router_z_loss_coef": _check_coefficient,
    "router_bias_update_rate": _check_coefficient,
    "expert_target_loss_coef": _check_coefficient,
    "use_rslora": check_flag,
    "norm_topk_prob": check_flag,
    "router_input_norm": check_flag,
    "null_expert": check_flag,
    "routing_level": partial(check_choice, choices=ROUTING_LEVELS),
    "router_scope": partial(check_choice, choices=ROUTER_SCOPES),
    "router_pooling": partial(check_choice, choices=ROUTER_POOLINGS),
    "router_aux_loss_window": partial(check_choice, choices=AUX_LOSS_WINDOWS),
    "base_config": partial(_check_optional, kind=dict, word="dict"),
    "base_architecture": _check_optional,
    "base_model_name_or_path": _check_optional,
    "base_revision": _check_optional,
    "base_folder": _check_optional,
    "base_subfolder": _check_optional,
}


def check_ranks(values: Mapping[str, Any]) -> None:
    """Ranks and scaling, of all linears and of single ones.

    Args:
        values: of the fields num_experts, r, lora_alpha, expert_ranks and expert_scaling.
    """
    experts = values["num_experts"]
    ranks = per_expert("r", values["r"], experts)
    for rank in ranks:
        check_integer("r", rank, 1, MAX_RANK)
    for alpha in per_expert("lora_alpha", values["lora_alpha"], experts):
        check_number("lora_alpha", alpha, 0.0, math.inf, open_low=True)
    inf = math.inf
    by_linear = values["expert_ranks"]
    check_by_linear("expert_ranks", by_linear, experts, check_integer, 0, MAX_RANK)
    check_by_linear("expert_scaling", values["expert_scaling"], experts, check_number, -inf, inf)
    for name, own in {"r": ranks, **(by_linear or {})}.items():
        if sum(own) > MAX_TOTAL_RANK:
            raise ValueError(
                f"The ranks of {name} add up to {sum(own)}; expected at most "
                f"{MAX_TOTAL_RANK}: lower r or num_experts."
            )


def check_reads(router: Any, values: Mapping[str, Any]) -> None:
    """Raise ValueError for fields that do nothing with what this router reads.

    Args:
        router: the class of the routers.
        values: of the fields router, routing_level, router_pooling, router_input_norm,
            norm_topk_prob, router_jitter_noise and router_bias_update_rate.
    """
    own = f"router={values['router']!r}"
    if router.reads_prompt and values["routing_level"] != "token":
        raise ValueError(
            f"{own} blends the routing of tokens and of sequences already: use "
            "routing_level='token', or router='top_k' for sequences alone."
        )
    if router.reads == "hidden_states":
        return
    what = {"input_ids": "the ids of tokens", "context": "router_context"}[router.reads]
    unused = {"router_pooling": "mean"}
    if router.reads == "input_ids":
        # Nor does it weigh its choices.
        unused |= {"router_input_norm": False, "norm_topk_prob": True}
        unused |= {"router_jitter_noise": 0.0, "router_bias_update_rate": 0.0}
    for name, default in unused.items():
        if values[name] != default:
            raise ValueError(
                f"{name}={values[name]!r} does nothing with {own}, which reads {what} and no "
                f"hidden states: leave it at {default!r}."
            )


def per_expert(name: str, value: Any, num_experts: int) -> Sequence:
    """The value of each expert of a field that is one for all or a list.

    Args:
        name: the field.
        value: what it holds.
        num_experts: how many experts there are.
    """
    if not isinstance(value, (list, tuple)):
        return [value] * num_experts
    if len(value) != num_experts:
        raise ValueError(
            f"{name} lists {len(value)} values for num_experts={num_experts}: give one "
            "number for all experts, or a list with one for each."
        )
    return value


def checked_names(names: Any, num_experts: int) -> list[str]:
    """expert_names as a list of different names that are fit for folders."""
    names = string_list("expert_names", names)
    if len(names) != num_experts or len(set(names)) != len(names):
        raise ValueError(
            f"expert_names={shown(names)} must be {num_experts} different names "
            f"(num_experts={num_experts})."
        )
    if NO_EXPERT in names:
        raise ValueError(
            f"expert_names contains {NO_EXPERT!r}, which stands for the null expert: rename it."
        )
    for problem in filter(None, map(expert_name_problem, names)):
        raise ValueError(f"expert_names: {problem}.")
    counts = Counter(map(str.casefold, names))
    if alike := [repr(name) for name in names if counts[name.casefold()] > 1]:
        raise ValueError(
            f"expert_names contains {' and '.join(alike[:4])}, which differ in case alone, and "
            "some file systems would hold them in one folder: rename them."
        )
    return names


def checked_layers(layers: Any) -> int | list[int] | None:
    """layers_to_transform; sets and tuples become lists, which JSON can hold."""
    if isinstance(layers, (list, tuple, set)):
        for number in layers:
            check_integer("layers_to_transform", number, 0)
        if not layers:
            raise ValueError("layers_to_transform is empty: give numbers, or None for all.")
        return sorted(layers)
    if layers is not None:
        check_integer("layers_to_transform", layers, 0)
    return layers
