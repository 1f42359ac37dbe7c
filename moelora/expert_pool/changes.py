"""The pool of experts of a model: adding, copying, replacing, removing and freezing single ones."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from ..adapters.composing import ExpertShape, set_experts
from ..config import MoeLoraConfig
from ..core.mixture import Mixture
from ..core.model import MixtureModel
from ..routers import Router
from ..validation import expert_name_problem
from .newcomers import Newcomer, newcomer
from .optimizer_state import PoolChange, TrainedRows


def add_expert(model: MixtureModel, name: str, **origin: Any) -> PoolChange:
    """Add a trainable expert; `origin` is what `newcomer` takes. See
    `MoeLoraForCausalLM.add_expert`.
    """
    _check_not_overridden(model)
    names = model.moelora_config.expert_names or []
    _check_name(name, names)
    new = newcomer(model, **origin)
    return _rebuild(model.moelora, [*range(len(names)), None], [*names, name], new)


def replace_expert(model: MixtureModel, name: str, **origin: Any) -> PoolChange:
    """Put a new trainable expert in the place of the one of this name; `origin` is what `newcomer`
    takes. See `MoeLoraForCausalLM.replace_expert`.
    """
    _check_not_overridden(model)
    names = model.moelora_config.expert_names or []
    index = model.moelora_config.expert_index(name)
    new = newcomer(model, **origin)
    keep = [None if e == index else e for e in range(len(names))]
    return _rebuild(model.moelora, keep, names, new)


def remove_expert(model: MixtureModel, name: str) -> PoolChange:
    """Remove an expert with its router rows; see `MoeLoraForCausalLM.remove_expert`."""
    _check_not_overridden(model)
    config = model.moelora_config
    index = config.expert_index(name)
    if config.num_experts <= config.num_experts_per_tok:
        raise ValueError(
            f"Expert {name!r} cannot be removed: {config.num_experts - 1} would remain, and every "
            f"token chooses num_experts_per_tok={config.num_experts_per_tok}. Load the checkpoint "
            "with a smaller one, or use replace_expert."
        )
    keep = [e for e in range(config.num_experts) if e != index]
    names = config.expert_names or []
    return _rebuild(model.moelora, keep, [names[e] for e in keep], None)


def freeze_experts(model: MixtureModel, names: Iterable[str] | str) -> PoolChange:
    """Freeze these experts; see `MoeLoraForCausalLM.freeze_experts`."""
    chosen = _indices(model.moelora_config, names)
    return _set_frozen(model.moelora, _frozen(model.moelora) | chosen)


def unfreeze_experts(model: MixtureModel, names: Iterable[str] | str) -> PoolChange:
    """Train these experts again; see `MoeLoraForCausalLM.unfreeze_experts`."""
    chosen = _indices(model.moelora_config, names)
    return _set_frozen(model.moelora, _frozen(model.moelora) - chosen)


def _indices(config: MoeLoraConfig, names: Iterable[str] | str) -> frozenset[int]:
    if not isinstance(names, Iterable):
        raise TypeError(
            f"names={names!r} is a {type(names).__name__}; expected an expert's name, or several: "
            f"{', '.join(config.expert_names or [])}."
        )
    names = [names] if isinstance(names, str) else names
    return frozenset(config.expert_index(name) for name in names)


def _frozen(mixture: Mixture) -> frozenset[int]:
    return next(mixture.factors()).frozen_experts


def _set_frozen(mixture: Mixture, experts: frozenset[int]) -> PoolChange:
    mixture.check_resident("freeze experts")
    change = PoolChange()
    for factor in mixture.factors():
        before = TrainedRows(factor)
        factor.set_frozen(experts)
        change.replaced_rows(before, factor, range(mixture.num_experts))
    return change


def _check_not_overridden(model: MixtureModel) -> None:
    if model.moelora.overridden:
        raise ValueError("The experts cannot change inside use_experts(): leave it first.")


def _check_name(name: str, names: Sequence[str]) -> None:
    if problem := expert_name_problem(name):
        raise ValueError(f"{problem[0].upper()}{problem[1:]}.")
    # Names that differ in case alone would share a folder on some file systems.
    if name.casefold() in {other.casefold() for other in names}:
        raise ValueError(
            f"There is an expert {name!r} already, among {', '.join(names)}: choose another name."
        )


def _rebuild(
    mixture: Mixture, keep: Sequence[int | None], names: Sequence[str], new: Newcomer | None
) -> PoolChange:
    """Make expert i the former `keep[i]`, or the newcomer where that is None.

    Everything is prepared before anything is put in, so that an error leaves the mixture as it was.
    """
    mixture.check_resident("change its experts")
    change = PoolChange()
    config = _config(mixture, keep, names, new)
    load = copy.deepcopy(mixture.load)
    load.resize(keep)
    routers = []
    for router in mixture.context.router_list:
        resized = _resized(router, keep, new)
        change.replaced_router(router, resized, keep)
        routers.append(resized)
    factors = []
    for site in mixture.site_list():
        lora_A, lora_B = site.restacked(config, keep, {} if new is None else new.factors)
        for before, after in zip(site.factors(), [lora_A, *lora_B], strict=True):
            change.replaced_rows(TrainedRows(before), after, keep)
        factors.append((lora_A, lora_B))
    # From here on nothing fails.
    mixture.put(config, load, routers, factors)
    return change


def _config(
    mixture: Mixture, keep: Sequence[int | None], names: Sequence[str], new: Newcomer | None
) -> MoeLoraConfig:
    """The configuration of the changed mixture, checked; what single linears have stays."""
    old = mixture.config
    linears = mixture.expert(0)

    def shape(expert: int | None) -> ExpertShape:
        if expert is not None:
            own = {n: (old.ranks_of(n)[expert], old.scaling_of(n)[expert]) for n in linears}
            return ExpertShape(old.ranks[expert], old._per_expert("lora_alpha")[expert], own)
        assert new is not None
        own = {n: (len(factors.A), factors.scaling) for n, factors in new.factors.items()}
        return ExpertShape(new.r, new.lora_alpha, own)

    changed = copy.deepcopy(old)
    set_experts(changed, names, [shape(expert) for expert in keep], linears)
    changed.validate()
    return changed


def _resized(router: Router, keep: Sequence[int | None], new: Newcomer | None) -> Router:
    """A resized copy of a router, whose scores have the right number."""
    resized = copy.deepcopy(router)
    resized.resize([(None if new is None else new.original) if e is None else e for e in keep])
    weight = next(resized.parameters(), None)
    x = torch.zeros(1, resized.in_features, device=None if weight is None else weight.device)
    try:
        with torch.no_grad():
            shape = tuple(resized.score(x).shape)
    except RuntimeError as error:
        shape = error
    if shape != (1, resized.num_choices):
        raise ValueError(
            f"{type(router).__name__} does not score {len(keep)} experts after resize() ({shape}): "
            "override resize where its parameters do not have one row an expert."
        )
    return resized
