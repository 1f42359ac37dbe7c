"""The pool of experts of a model: adding, copying, replacing, removing and freezing single ones."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from statistics import mode
from typing import Any

import torch
from torch import Tensor

from ..adapters.composing import ExpertShape, adapter_factors, set_experts, usual_shape
from ..adapters.merging import seeded
from ..adapters.reading import source_name
from ..core.expert_init import begin_one
from ..core.experts import LoraFactors
from ..core.mixture import Mixture
from ..core.model import MixtureModel
from ..placement import check_lora
from ..routers import Router
from ..training.evaluation import check_not_overridden
from ..validation import check_integer, check_number, expert_name_problem
from .choices import carry_choices, common_shape
from .optimizer_state import PoolChange, trained

# An expert to be: its shape, its factors by the linear's full name, where it is there, and the
# number of the expert that it is a copy of.
Newcomer = tuple[ExpertShape, dict[str, LoraFactors], int | None]


def add_expert(model: MixtureModel, name: str, **origin: Any) -> PoolChange:
    """Add a trainable expert; see `MoeLoraForCausalLM.add_expert`."""
    names = model.moelora_config.expert_names or []
    if problem := expert_name_problem(name):
        raise ValueError(f"No expert was added: {problem}.")
    # Names that differ in case alone would share a folder on some file systems.
    if name.casefold() in {other.casefold() for other in names}:
        raise ValueError(
            f"There is an expert {name!r} already, among {', '.join(names)}: choose another name."
        )
    new = _newcomer(model, **origin)
    # Shared experts stay the last.
    routed = model.moelora_config.num_routed_experts
    keep = [*range(routed), None, *range(routed, len(names))]
    change = _rebuild(model, keep, [*names[:routed], name, *names[routed:]], new)
    _note_source(model, name, origin)
    return change


def replace_expert(model: MixtureModel, name: str, **origin: Any) -> PoolChange:
    """Put a new trainable expert in the place of one; see `MoeLoraForCausalLM.replace_expert`."""
    names = model.moelora_config.expert_names or []
    index = model.moelora_config.expert_index(name)
    keep = [None if e == index else e for e in range(len(names))]
    change = _rebuild(model, keep, names, _newcomer(model, leaves=index, **origin))
    _note_source(model, name, origin)
    return change


def remove_expert(model: MixtureModel, name: str) -> PoolChange:
    """Remove an expert with its router rows; see `MoeLoraForCausalLM.remove_expert`."""
    config = model.moelora_config
    index = config.expert_index(name)
    shared = name in config.shared_expert_names
    choices = {"every router": range(config.num_routed_experts), **(config.layer_experts or {})}
    slots = 1 if config.may_use_all_experts else config.num_experts_per_tok
    for where, experts in choices.items():
        if index in experts and len(experts) <= slots:
            raise ValueError(
                f"Expert {name!r} cannot be removed: {where} would have {len(experts) - 1} experts "
                f"to choose among, and every token chooses num_experts_per_tok={slots}. Load the "
                "checkpoint with a smaller one, or use replace_expert."
            )
    keep = [e for e in range(config.num_experts) if e != index]
    names = [own for own in config.expert_names or [] if own != name]
    change = _rebuild(model, keep, names, num_shared=config.num_shared_experts - int(shared))
    _note_source(model, name, {})
    return change


def _note_source(model: MixtureModel, name: str, origin: Mapping[str, Any]) -> None:
    """Note where expert `name` came from, for the model card; nothing where it was made here."""
    config = model.moelora_config
    sources = {own: source for own, source in (config.expert_sources or {}).items() if own != name}
    if origin.get("adapter") is not None:
        sources[name] = source_name(origin["adapter"])
    elif origin.get("copy_of") is not None:
        sources[name] = f"a copy of {origin['copy_of']}"
    config.expert_sources = sources or None


def freeze_experts(model: MixtureModel, names: Iterable[str] | str) -> PoolChange:
    """Freeze these experts; see `MoeLoraForCausalLM.freeze_experts`."""
    return _set_frozen(model, names, frozenset.union)


def unfreeze_experts(model: MixtureModel, names: Iterable[str] | str) -> PoolChange:
    """Train these experts again; see `MoeLoraForCausalLM.unfreeze_experts`."""
    return _set_frozen(model, names, frozenset.difference)


def _set_frozen(
    model: MixtureModel, names: Iterable[str] | str, changed: Callable[..., frozenset[int]]
) -> PoolChange:
    config = model.moelora_config
    if not isinstance(names, Iterable):
        raise TypeError(
            f"names={names!r} is a {type(names).__name__}; expected an expert's name, or several: "
            f"{', '.join(config.expert_names or [])}."
        )
    chosen = [config.expert_index(name) for name in ([names] if isinstance(names, str) else names)]
    model.moelora.check_resident("freeze experts")
    change = PoolChange()
    for factor in model.moelora.factors():
        before = trained(factor)
        factor.set_frozen(changed(factor.frozen_experts, chosen))
        change.replaced_rows(before, trained(factor), range(config.num_experts))
    return change


def _rebuild(
    model: MixtureModel,
    keep: Sequence[int | None],
    names: Sequence[str],
    new: Newcomer | None = None,
    num_shared: int | None = None,
) -> PoolChange:
    """Make expert i the former `keep[i]`, or the newcomer where that is None, the last `num_shared`
    shared (by default as many as before).

    Everything is prepared before anything is put in, so that an error leaves the mixture as it was.
    """
    check_not_overridden(model)
    shape, fresh, original = new or (None, {}, None)
    mixture = model.moelora
    mixture.check_resident("change its experts")
    change = PoolChange()
    config = copy.deepcopy(mixture.config)
    shapes = [_shape_of(mixture, e) for e in keep if e is not None]
    if shape is not None:
        shapes.insert(keep.index(None), shape)
    config.num_shared_experts = config.num_shared_experts if num_shared is None else num_shared
    set_experts(config, names, shapes, mixture.linears())
    carry_choices(mixture, config, keep, fresh, original)
    config.validate()
    # Of the routed experts, which are the first both before and after.
    routed = keep[: config.num_routed_experts]
    load = copy.deepcopy(mixture.load)
    load.resize(routed)
    if original is not None and original >= mixture.config.num_routed_experts:
        # A copy of a shared expert, of which routers have no row.
        original = None
    routers = []
    for router in mixture.router_list:
        resized = _resized(router, [original if e is None else e for e in routed])
        change.replaced_router(router, resized, routed)
        routers.append(resized)
    factors = []
    for site in mixture.sites.values():
        lora_A, lora_B = site.restacked(config, keep, fresh)
        for before, after in zip(site.factors(), [lora_A, *lora_B], strict=True):
            # What all experts share stays, whoever comes and goes.
            own = [0] if before.shared else keep
            change.replaced_rows(trained(before), trained(after), own)
        factors.append((lora_A, lora_B))
    # From here on nothing fails.
    mixture.put(config, load, routers, factors)
    return change


def _resized(router: Router, keep: Sequence[int | None]) -> Router:
    """A resized copy of a router, whose scores have the right number."""
    resized = copy.deepcopy(router)
    resized.resize(keep)
    weight = next(resized.parameters(), None)
    x = resized.blank_rows(1, None if weight is None else weight.device)
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


def _newcomer(
    model: MixtureModel,
    *,
    adapter: Any = None,
    copy_of: str | None = None,
    noise: float = 0.0,
    r: int | None = None,
    lora_alpha: float | None = None,
    seed: int | None = None,
    allow_base_mismatch: bool = False,
    leaves: int | None = None,
) -> Newcomer:
    """The expert that these arguments of `MoeLoraForCausalLM.add_expert` describe, in the place of
    expert number `leaves` if any; the model is only read.
    """
    if adapter is not None and copy_of is not None:
        raise ValueError(
            "adapter and copy_of exclude each other: an expert comes from one of them."
        )
    check_number("noise", noise, 0.0, math.inf)
    if noise and copy_of is None:
        raise ValueError(
            f"noise={noise} is added to a copy: name its original with copy_of, or drop it."
        )
    if (r, lora_alpha) != (None, None) and (adapter is not None or copy_of is not None):
        raise ValueError(
            "r and lora_alpha are for a fresh expert; an adapter or a copy brings its own."
        )
    generator = seeded(seed)
    if adapter is not None:
        check_lora(model.moelora_config, "An expert from a PEFT adapter")
        factors = adapter_factors(adapter, model, allow_base_mismatch=allow_base_mismatch)
        if unknown := sorted(factors.keys() - set(model.moelora.linears())):
            raise ValueError(
                f"The adapter adapts {', '.join(unknown[:5])} ({len(unknown)} in all), not adapted "
                "here: use from_adapters, or a mixture whose target_modules has them."
            )
        if model.moelora_config.share_lora_A:
            _check_shared(model.moelora, factors)
        linears = {name: (len(own.A), own.scaling) for name, own in factors.items()}
        return usual_shape(linears, model.moelora_config.use_rslora), factors, None
    if copy_of is not None:
        expert = model.moelora_config.expert_index(copy_of)
        return _copied(model.moelora, expert, noise, generator)
    return _fresh(model, r, lora_alpha, generator, leaves)


def _check_shared(mixture: Mixture, factors: Mapping[str, LoraFactors]) -> None:
    """Raise ValueError unless an adapter has the A that the experts of the mixture share."""
    for linear, own in mixture.expert(0).items():
        A = factors[linear].A if linear in factors else own.A[:0]
        if not torch.equal(A.to(own.A), own.A):
            raise ValueError(
                f"The adapter's A of {linear} is not the one that all experts share "
                "(share_lora_A=True), and with that one its B means something else. Use a mixture "
                "without share_lora_A (from_adapters), or train the adapter from an expert of this "
                "one (export_expert) with its lora_A frozen."
            )


def _shape_of(mixture: Mixture, expert: int) -> ExpertShape:
    config = mixture.config
    linears = {
        name: (config.ranks_of(name)[expert], config.scaling_of(name)[expert])
        for name in mixture.linears()
    }
    return ExpertShape(config.ranks[expert], config._per_expert("lora_alpha")[expert], linears)


def _fresh(
    model: MixtureModel,
    r: int | None,
    alpha: float | None,
    generator: torch.Generator | None,
    leaves: int | None,
) -> Newcomer:
    mixture = model.moelora
    config = mixture.config
    usual_r, usual_alpha = mode(zip(config.ranks, config._per_expert("lora_alpha")))
    own_r = usual_r if r is None else r
    own_alpha = usual_alpha if alpha is None else alpha
    check_integer("r", own_r, 1)
    check_number("lora_alpha", own_alpha, 0.0, math.inf, open_low=True)
    if config.share_lora_A and own_r != usual_r:
        raise ValueError(
            f"r={r}, and the experts share an A of rank {usual_r} (share_lora_A=True): leave r out."
        )
    begin = _beginning(model, generator, leaves)
    factors = {}
    shapes = {}
    for linear, like in mixture.expert(0).items():
        # Where all have the same, as by a rank_pattern, the new one has it too.
        common = common_shape(config, linear) if (r, alpha) == (None, None) else None
        # The shared A may have another rank in some linears, even 0.
        rank = len(like.A) if config.share_lora_A else own_r
        rank, scaling = common or (rank, *config.scaling_by([own_alpha], [rank or 1]))
        B = like.B.new_zeros(rank, like.B.shape[1])
        factors[linear] = LoraFactors(begin(linear, rank, like).to(like.A), B, scaling)
        shapes[linear] = (rank, scaling)
    return ExpertShape(own_r, own_alpha, shapes), factors, None


def _beginning(
    model: MixtureModel, generator: torch.Generator | None, leaves: int | None
) -> Callable[[str, int, LoraFactors], Tensor]:
    """What makes a fresh expert's A of a linear, a rank and another expert's factors there, as
    `expert_init` says.
    """
    mixture = model.moelora
    config = mixture.config
    if config.expert_init == "kaiming" or config.share_lora_A or not mixture.has_values:
        return partial(_kaiming, generator=generator)
    staying = [mixture.expert(e) for e in range(config.num_experts) if e != leaves]

    def begin(linear: str, rank: int, like: LoraFactors) -> Tensor:
        # Of nobody else, its own width is known all the same.
        others = [like.A[:0], *(own[linear].A for own in staying)]
        return begin_one(model, linear, others, rank, like.B.shape[1], generator)

    return begin


def _kaiming(
    linear: str, rank: int, like: LoraFactors, generator: torch.Generator | None
) -> Tensor:
    bound = 1 / math.sqrt(like.A.shape[1])
    # Drawn on the CPU: one seed gives the same expert on every device.
    A = torch.empty(rank, like.A.shape[1], dtype=like.A.dtype, device="cpu")
    return A.uniform_(-bound, bound, generator=generator)


def _copied(
    mixture: Mixture, expert: int, noise: float, generator: torch.Generator | None
) -> Newcomer:
    def noisy(block: Tensor) -> Tensor:
        if not noise or not block.numel():
            return block.clone()
        drawn = torch.randn(block.shape, generator=generator, dtype=block.dtype).to(block.device)
        return block + noise * block.std(correction=0) * drawn

    # An A that is shared is not a copy's to change.
    shared = mixture.config.share_lora_A
    factors = {
        linear: LoraFactors(own.A if shared else noisy(own.A), noisy(own.B), own.scaling)
        for linear, own in mixture.expert(expert).items()
    }
    return _shape_of(mixture, expert), factors, expert
