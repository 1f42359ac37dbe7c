"""The checks of `MoeLoraConfig`: of single fields as data, of several together as functions."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from .backtracking import check_regex
from .validation import (
    MAX_EXPERTS,
    MAX_RANK,
    MAX_TOTAL_RANK,
    check_by_linear,
    check_choice,
    check_flag,
    check_integer,
    check_number,
    check_type,
    expert_name_problem,
    shown,
    string_list,
)

FORMAT_VERSION = 1
ROUTING_LEVELS = ("token", "sequence")
ROUTER_SCOPES = ("projection", "site", "layer", "model")
ROUTER_POOLINGS = ("mean", "last", "attention")
EXPERT_INITS = ("kaiming", "orthogonal", "svd")
AUX_LOSS_WINDOWS = ("previous_step", "micro_batch")
# How many quarters of the routed experts each quarter of the layers has (arXiv:2402.08562).
LAYER_RULES = {"increasing": (1, 2, 3, 4), "decreasing": (4, 3, 2, 1), "hourglass": (4, 1, 1, 4)}
# What reports and label mappings call the null expert.
NO_EXPERT = "(base)"


def _check_optional(name: str, value: Any, kind: type = str, word: str = "string") -> None:
    if not isinstance(value, (kind, type(None))):
        raise TypeError(f"{name} is not a {word}, but {shown(value)}.")


def _check_slots(name: str, value: Any) -> None:
    if value is not None:
        check_integer(name, value, low=1, high=MAX_EXPERTS)


def _check_sources(name: str, value: Any) -> None:
    _check_optional(name, value, dict, "dict")
    strings = all(isinstance(word, str) for pair in (value or {}).items() for word in pair)
    check_type(name, value, strings, "a dict of strings by the expert's name")


_check_share = partial(check_number, low=0.0, high=1.0, open_high=True)
_check_coefficient = partial(check_number, low=0.0, high=math.inf)
# The checks of single fields, as data; those that say more are functions.
FIELD_CHECKS: dict[str, Callable[[str, Any], None]] = {
    "num_experts": partial(check_integer, low=1, high=MAX_EXPERTS),
    "num_shared_experts": partial(check_integer, low=0, high=MAX_EXPERTS),
    "num_experts_per_tok": _check_slots,
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
    "share_lora_A": check_flag,
    "expert_init": partial(check_choice, choices=EXPERT_INITS),
    "norm_topk_prob": check_flag,
    "router_input_norm": check_flag,
    "null_expert": check_flag,
    "routing_level": partial(check_choice, choices=ROUTING_LEVELS),
    "router_scope": partial(check_choice, choices=ROUTER_SCOPES),
    "router_pooling": partial(check_choice, choices=ROUTER_POOLINGS),
    "router_aux_loss_window": partial(check_choice, choices=AUX_LOSS_WINDOWS),
    "base_config": partial(_check_optional, kind=dict, word="dict"),
    "expert_sources": _check_sources,
    "base_architecture": _check_optional,
    "base_model_name_or_path": _check_optional,
    "base_revision": _check_optional,
    "base_folder": _check_optional,
    "base_subfolder": _check_optional,
}


def check_choices(values: Mapping[str, Any], decides: bool) -> None:
    """Every router has experts enough for its slots, and every expert a router or all tokens.

    Args:
        values: of the fields num_experts, num_shared_experts, num_experts_per_tok, router_scope,
            experts_per_layer and layer_experts.
        decides: routers decide by themselves how many experts act, of those that a layer has.
    """
    experts = values["num_experts"]
    shared = values["num_shared_experts"]
    slots = values["num_experts_per_tok"]
    routed = experts - shared
    if routed < 1:
        raise ValueError(
            f"num_shared_experts={shared} of num_experts={experts} leaves routers none to choose "
            "among: lower num_shared_experts, or raise num_experts, which counts them too."
        )
    if slots > routed:
        beside = f" less num_shared_experts={shared}" if shared else ""
        raise ValueError(
            f"num_experts_per_tok={slots} is more than num_experts={experts}{beside}: a token "
            "cannot choose more experts than there are. Lower num_experts_per_tok."
        )
    slots = 1 if decides else slots
    counts = values["experts_per_layer"]
    if isinstance(counts, list):
        _check_layers({"experts_per_layer": counts}, routed, slots)
        if max(counts) < routed:
            raise ValueError(
                f"experts_per_layer={shown(counts)} has no layer with all {routed} experts that "
                "routers choose among: lower num_experts, or let one layer have them all."
            )
    by_layer = values["layer_experts"]
    _check_layer_experts(by_layer, routed)
    sizes = {f"layer_experts[{shown(k)}]": [len(own)] for k, own in (by_layer or {}).items()}
    _check_layers(sizes, routed, slots)
    differ = isinstance(counts, str) or any(n < routed for n in counts or [])
    if values["router_scope"] == "model" and (differ or any([routed] != n for n in sizes.values())):
        raise ValueError(
            "router_scope='model' makes one choice for all layers, and experts_per_layer (or "
            "layer_experts) gives some of them fewer experts: use router_scope='layer' or 'site'."
        )


def _check_layers(sizes: Mapping[str, list[int]], routed: int, slots: int) -> None:
    """Raise where a layer has no expert, too many, or fewer than a token chooses."""
    for name, counts in sizes.items():
        for count in counts:
            check_integer(name, count, 1, routed)
        if min(counts) < slots:
            raise ValueError(
                f"{name} leaves a layer {min(counts)} experts to choose among, fewer than "
                f"num_experts_per_tok={slots}: lower that, or give the layer more experts."
            )


def _check_layer_experts(by_layer: Any, routed: int) -> None:
    """layer_experts: by the layer's name the different numbers of routed experts, rising."""
    is_table = isinstance(by_layer, (dict, type(None)))
    check_type("layer_experts", by_layer, is_table, "a dict of lists by the layer's full name")
    for layer, experts in (by_layer or {}).items():
        own = f"layer_experts[{shown(layer)}]"
        check_type(own, experts, isinstance(experts, list), "a list of experts' numbers")
        for expert in experts:
            check_integer(own, expert, 0, routed - 1)
        if not experts or experts != sorted(set(experts)):
            raise ValueError(
                f"{own}={shown(experts)}: expected one number at least, different ones that rise."
            )


def checked_layer_counts(counts: Any) -> str | list[int] | None:
    """experts_per_layer; a tuple becomes a list, which JSON can hold."""
    if isinstance(counts, str):
        check_choice("experts_per_layer", counts, tuple(LAYER_RULES))
    elif counts is not None:
        is_list = isinstance(counts, (list, tuple)) and len(counts) > 0
        rules = ", ".join(LAYER_RULES)
        check_type("experts_per_layer", counts, is_list, f"a list of numbers, or one of: {rules}")
        return list(counts)
    return counts


def check_patterns(values: Mapping[str, Any]) -> None:
    """rank_pattern and alpha_pattern: one number for all experts, or a list with one for each.

    Args:
        values: of these fields and num_experts.
    """
    for field, check in (
        ("rank_pattern", partial(check_integer, low=1, high=MAX_RANK)),
        ("alpha_pattern", partial(check_number, low=0.0, high=math.inf, open_low=True)),
    ):
        table = values[field]
        by_pattern = isinstance(table, (dict, type(None))) and all(
            isinstance(key, str) for key in table or ()
        )
        check_type(field, table, by_pattern, "a dict by the end of a linear's name, or a regex")
        for pattern, value in (table or {}).items():
            check_regex(field, pattern)
            # As PEFT matches it.
            check_regex(field, rf"(.*\.)?({pattern})$")
            own = f"{field}[{shown(pattern)}]"
            for number in per_expert(own, value, values["num_experts"]):
                check(own, number)


def check_ranks(values: Mapping[str, Any]) -> None:
    """Ranks and scaling, of all linears and of single ones, and what is dropped of each expert.

    Args:
        values: of the fields num_experts, r, lora_alpha, expert_ranks, expert_scaling,
            expert_dropout and share_lora_A.
    """
    experts = values["num_experts"]
    ranks = per_expert("r", values["r"], experts)
    for rank in ranks:
        check_integer("r", rank, 1, MAX_RANK)
    for alpha in per_expert("lora_alpha", values["lora_alpha"], experts):
        check_number("lora_alpha", alpha, 0.0, math.inf, open_low=True)
    for share in per_expert("expert_dropout", values["expert_dropout"], experts):
        _check_share("expert_dropout", share)
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
        if values["share_lora_A"] and len(set(own)) > 1:
            raise ValueError(
                f"share_lora_A=True and the ranks in {name} are {shown(list(own))}: experts that "
                "share A have its rank. Give all one rank in a linear, or leave share_lora_A out."
            )
    if values["share_lora_A"]:
        _check_alike(values)


def _check_alike(values: Mapping[str, Any]) -> None:
    """Raise ValueError where rules for layers and linears would make experts with one A differ."""
    for name in ("experts_per_layer", "layer_experts"):
        if values[name] is not None:
            raise ValueError(
                f"share_lora_A=True and {name}={shown(values[name])}: experts that share A are all "
                "in every layer. Leave one of the two out."
            )
    for pattern, ranks in (values["rank_pattern"] or {}).items():
        if isinstance(ranks, (list, tuple)) and len(set(ranks)) > 1:
            raise ValueError(
                f"share_lora_A=True and rank_pattern[{shown(pattern)}]={shown(ranks)}: experts "
                "that share A have its rank. Give one number, or leave share_lora_A out."
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
