"""What a configuration says of layers and by patterns, written out for each linear and layer."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

from peft.utils.other import get_pattern_key
from torch import nn
from transformers import PreTrainedModel

from ..config import MoeLoraConfig
from ..config_checks import LAYER_RULES, per_expert
from ..placement import ends_of
from ..validation import shown
from .modules import decoder_layer


def write_out(model: PreTrainedModel, config: MoeLoraConfig, is_new: bool) -> None:
    """Set `layer_experts`, `expert_ranks` and `expert_scaling` of the linears in `config.sites` by
    `experts_per_layer`, `rank_pattern` and `alpha_pattern`.

    A configuration that was written out before comes out as it is; only scalings follow another
    lora_alpha, which a checkpoint may be loaded with.

    Args:
        model: the base.
        config: of the mixture.
        is_new: it is not a checkpoint's.

    Raises:
        ValueError: a pattern that matches no adapted linear, ranks or scalings of a linear that are
            listed otherwise, a layer that does not exist, or an expert that would be nowhere.
    """
    by_rule = (config.rank_pattern, config.alpha_pattern, config.experts_per_layer)
    if not any(by_rule) and config.layer_experts is None:
        return
    linears = list(chain.from_iterable(config.sites or []))
    layers = {name: decoder_layer(model, ends_of(name)[0]) for name in linears}
    config.layer_experts = _layer_experts(model, config, list(dict.fromkeys(layers.values())))
    config.validate()
    ranks = {name: list(config.ranks_of(name)) for name in linears}
    scaling = {name: list(config.scaling_of(name)) for name in linears}
    for name, (own_ranks, own_scaling) in _by_pattern(config, linears).items():
        listed = (config.expert_ranks or {}).get(name, own_ranks)
        listed_scaling = (config.expert_scaling or {}).get(name, own_scaling)
        # Rank 0: the expert is not there.
        expected = [own if there else 0 for there, own in zip(listed, own_ranks)]
        if listed != expected or (is_new and listed_scaling != own_scaling):
            raise ValueError(
                f"{name!r} is in expert_ranks or expert_scaling ({listed}, {listed_scaling}), and "
                f"patterns give it {own_ranks}, {own_scaling}: leave it out of one of them."
            )
        ranks[name] = expected
        scaling[name] = own_scaling
    for name, layer in layers.items():
        here = _present(config, layer)
        ranks[name] = [rank if e in here else 0 for e, rank in enumerate(ranks[name])]
    usual = (list(config.ranks), list(config.scaling))
    config.expert_ranks = {n: own for n, own in ranks.items() if own != usual[0]} or None
    config.expert_scaling = {n: own for n, own in scaling.items() if own != usual[1]} or None
    config.validate()
    for expert, name in enumerate(config.expert_names or []):
        if not any(own[expert] for own in ranks.values()):
            raise ValueError(
                f"Expert {name!r} would be in no adapted linear: the layers that have it are not "
                "among layers_to_transform or target_modules. Adapt one, or lower num_experts."
            )


def _layer_experts(
    model: PreTrainedModel, config: MoeLoraConfig, adapted: Sequence[str | None]
) -> dict[str, list[int]] | None:
    """The routed experts that each adapted decoder layer has: as listed, else the first so many."""
    listed = config.layer_experts or {}
    layers = [layer for layer in adapted if layer is not None]
    if unknown := sorted(listed.keys() - set(layers)):
        raise ValueError(
            f"layer_experts names {unknown[0]!r}, which is not an adapted decoder layer. They are: "
            f"{', '.join(layers[:4])} … ({len(layers)} in all)."
        )
    if config.experts_per_layer is None:
        return config.layer_experts
    written = {}
    for layer in layers:
        path, _, number = layer.rpartition(".")
        blocks: Any = model.get_submodule(path)
        assert isinstance(blocks, nn.ModuleList)
        count = layer_counts(config, len(blocks))[int(number)]
        written[layer] = listed.get(layer, list(range(count)))
    return written


def layer_counts(config: MoeLoraConfig, num_layers: int) -> list[int]:
    """How many of the routed experts each of so many decoder layers has, by `experts_per_layer`.

    Args:
        config: the mixture's.
        num_layers: how many decoder layers there are.

    Raises:
        ValueError: more groups than layers.
    """
    counts = config.experts_per_layer
    routed = config.num_routed_experts
    if counts is None:
        return [routed] * num_layers
    if isinstance(counts, str):
        # Never fewer than every token chooses.
        least = config.num_experts_per_tok
        counts = [max(least, math.ceil(routed * share / 4)) for share in LAYER_RULES[counts]]
    if len(counts) > num_layers:
        raise ValueError(
            f"experts_per_layer={shown(config.experts_per_layer)} gives {len(counts)} groups of "
            f"layers their numbers of experts, and the base has {num_layers} decoder layers: give "
            "a list of at most one number for each."
        )
    return [counts[i * len(counts) // num_layers] for i in range(num_layers)]


def _present(config: MoeLoraConfig, layer: str | None) -> set[int]:
    """The experts, routed and shared, that a decoder layer has; outside of any, all."""
    routed = range(config.num_routed_experts)
    here = (config.layer_experts or {}).get(layer or "", routed)
    return {*here, *range(config.num_routed_experts, config.num_experts)}


def _by_pattern(
    config: MoeLoraConfig, linears: Sequence[str]
) -> dict[str, tuple[list[int], list[float]]]:
    """Ranks and scalings of the linears that a pattern matches, as PEFT matches them."""
    found = {}
    used: dict[str, set[str]] = {"rank_pattern": set(), "alpha_pattern": set()}

    def matched(field: str, linear: str, usual: Sequence) -> Sequence:
        table: Mapping[str, Any] = getattr(config, field) or {}
        pattern = get_pattern_key(list(table), linear)
        if pattern not in table:
            return usual
        used[field].add(pattern)
        return per_expert(field, table[pattern], config.num_experts)

    usual_ranks = config.ranks
    usual_alphas = config._per_expert("lora_alpha")
    for linear in linears:
        ranks = matched("rank_pattern", linear, usual_ranks)
        alphas = matched("alpha_pattern", linear, usual_alphas)
        if ranks is not usual_ranks or alphas is not usual_alphas:
            found[linear] = (list(ranks), list(config.scaling_by(alphas, ranks)))
    for field, patterns in used.items():
        for pattern in getattr(config, field) or {}:
            if pattern not in patterns:
                raise ValueError(
                    f"{field} names {pattern!r}, which matches no adapted linear (or only those "
                    f"that an earlier pattern matches). They are: {', '.join(linears[:4])} … "
                    f"({len(linears)} in all)."
                )
    return found
