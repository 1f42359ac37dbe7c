"""Which linears of a base are adapted, by PEFT's tables and rules, and which of them are one site:
a probe forward shows which linears (and blocks) of a decoder layer read the same tensor.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain

import peft
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as PEFT_TARGETS
from peft.utils.constants import SEQ_CLS_HEAD_NAMES
from torch import nn
from transformers import PreTrainedModel

from ..config import MoeLoraConfig
from ..host_internals import check_mamba_targets, include_all_linear
from ..placement import ends_of
from .blocks import block_sizes, find_blocks
from .left_out import (
    FUSED,
    check_all_match,
    fused_experts,
    report_fused,
    why_not_called,
    with_ancestors,
)
from .modules import decoder_layer, ending_in, features, is_in_layers, layer_number, nearest
from .probe import first_inputs, probe

ALL_LINEAR = "all-linear"


def find_sites(
    model: PreTrainedModel, config: MoeLoraConfig, is_classifier: bool, unadapted: dict[str, str]
) -> list[list[str]]:
    """Group the targets that read the same tensor in one decoder layer; in series each is alone.

    `unadapted` is filled with what a shorthand like "all-linear" met and could not adapt, and why;
    `config.block_sizes` with how wide the blocks are.
    """
    targets, named = find_targets(model, config, is_classifier)
    blocks = find_blocks(model, config)
    places = [*targets, *blocks]
    calls = probe(model, with_ancestors(chain.from_iterable(map(ends_of, places))))
    read = first_inputs(calls)
    groups: dict[tuple, list[str]] = {}
    for name in places:
        first, _ = ends_of(name)
        layer = decoder_layer(model, first)
        called = first in read
        reason = _why_not_routed(layer, config) if called else why_not_called(first, read)
        if reason is None:
            is_alone = config.router_scope == "projection" or config.expert_placement == "series"
            alone = name if is_alone else None
            groups.setdefault((layer, id(read.get(first)), alone), []).append(name)
        elif named or name in blocks:
            field = "target_blocks" if name in blocks else "target_modules"
            raise ValueError(f"{field} names {name!r}, which cannot be adapted: {reason}.")
        else:
            unadapted[name] = reason
    if not named:
        fused = fused_experts(model)
        unadapted |= dict.fromkeys(fused, FUSED)
        report_fused(model, fused)
    if not groups:
        raise ValueError(f"No target module can be adapted: {unadapted}.")
    if blocks:
        config.block_sizes = block_sizes(model, config, blocks, calls)
    return list(groups.values())


def _why_not_routed(layer: str | None, config: MoeLoraConfig) -> str | None:
    """Why a linear of this decoder layer has no router in the configured scope, or None."""
    scope = config.router_scope
    if scope in ("layer", "model") and layer is None:
        return f"it lies outside of the decoder layers, which router_scope={scope!r} routes"
    if scope == "model" and (layer_number(layer) or 0) < config.router_layer:
        return (
            f"it lies before router_layer={config.router_layer}, whose input the model's router "
            "reads"
        )
    return None


def find_targets(
    model: PreTrainedModel, config: MoeLoraConfig, is_classifier: bool
) -> tuple[dict[str, nn.Module], bool]:
    """The linears to adapt, by name in the model's order, and whether the user named them; none
    where target_blocks alone says what is adapted.

    Raises:
        ValueError: nothing matches (with the nearest names), or a named module is not a linear.
    """
    targets = config.target_modules
    if targets is None and config.target_blocks:
        return {}, False
    if targets is None:
        targets = PEFT_TARGETS.get(model.config.model_type, ALL_LINEAR)
    all_linear = isinstance(targets, str) and targets.lower() == ALL_LINEAR
    named = config.target_modules is not None and not all_linear
    # PEFT refuses layers_to_transform beside the shorthand; here both together mean what they say.
    layers = config.layers_to_transform
    lora = peft.LoraConfig(
        target_modules=targets,
        layers_to_transform=None if all_linear else layers,
        modules_to_save=modules_to_save(model, config, is_classifier) or None,
        task_type="SEQ_CLS" if is_classifier else "CAUSAL_LM",
    )
    include_all_linear(lora, model)
    targeted = {}
    for name, module in model.named_modules():
        if not name or not check_target_module_exists(lora, name):
            continue
        if all_linear and not is_in_layers(model, name, layers):
            continue
        try:
            if features(module) is None:
                raise ValueError(
                    f"target_modules matches {name!r}, a {type(module).__name__}: only linear "
                    "layers (also Conv1D and quantised ones) can carry LoRA experts. Name its "
                    "linears, or use a narrower regex; experts beside a whole module are what "
                    "target_blocks is for."
                )
            check_mamba_targets(lora, model, name.rpartition(".")[2])
            targeted[name] = module
        except ValueError:
            if named:
                raise
    if not targeted:
        raise ValueError(_nothing_matched(model, config))
    if isinstance(config.target_modules, list):
        check_all_match(model, config.target_modules)
    return targeted, named


def modules_to_save(
    model: PreTrainedModel, config: MoeLoraConfig, is_classifier: bool
) -> list[str]:
    """The base's modules that train: the configured ones, else a classifier's head."""
    if config.modules_to_save is not None:
        return list(config.modules_to_save)
    return [n for n in SEQ_CLS_HEAD_NAMES if is_classifier and hasattr(model, n)]


def saved_modules(
    model: PreTrainedModel, config: MoeLoraConfig, is_classifier: bool
) -> Iterator[nn.Module]:
    """The modules that `modules_to_save` names, whole or by their end; ValueError for none."""
    for name in modules_to_save(model, config, is_classifier):
        matches = ending_in(model, name)
        if not matches:
            raise ValueError(
                f"modules_to_save names {name!r}, which is in no {type(model).__name__}. Its "
                f"parts are called: {', '.join(n for n, _ in model.named_children())}."
            )
        yield from matches.values()


def _nothing_matched(model: PreTrainedModel, config: MoeLoraConfig) -> str:
    linears = [n for n, m in model.named_modules() if features(m) is not None]
    ends = sorted({n.rpartition(".")[2] for n in linears})
    asked = config.target_modules
    words = [asked] if isinstance(asked, str) else list(asked or [])
    layers = config.layers_to_transform
    where = "" if layers is None else f" in layers {layers}"
    return (
        f"target_modules={asked!r}{where} matches no module of {type(model).__name__}. "
        f"{nearest(words, linears)} Its linears are called: {', '.join(ends)}."
    )
