"""The pool of experts of a model: adding, copying, replacing, removing and freezing single ones."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..adapters.preflight import name_problem
from ..config import MoeLoraConfig
from ..core.experts import Factor
from ..routers import Router
from .newcomers import Newcomer, newcomer
from .optimizer_state import PoolChange, TrainedRows


class ExpertPool:
    """The part of a model with a mixture inside that changes which experts there are, and which of
    them train.
    """

    def add_expert(
        self,
        name: str,
        *,
        adapter: Any = None,
        copy_of: str | None = None,
        noise: float = 0.0,
        r: int | None = None,
        lora_alpha: float | None = None,
        seed: int | None = None,
        allow_base_mismatch: bool = False,
    ) -> PoolChange:
        """Add a trainable expert: a fresh one (B = 0), a PEFT adapter, or a copy of another.

        The other experts and their router rows keep their bits. A copy begins with the router row
        of its original, any other expert with the mean of all rows.
        adapter: a folder, hub id or `PeftModel` (allow_base_mismatch: of another base). copy_of: an
        expert; noise: the Gaussian noise on the copy, in standard deviations of each factor's
        block. r, lora_alpha: of a fresh expert, by default the others' most common. seed: for A or
        the noise. Returns what `resume_optimizer` needs to go on with an optimizer.

        Raises:
            ValueError, TypeError: a name that is taken or unfit for a folder, an adapter that does
            not fit, or
                arguments at odds; the model is as it was then.
        """
        model: Any = self
        _check_free(model)
        _check_name(name, model.moelora_config.expert_names)
        new = newcomer(model, adapter, copy_of, noise, r, lora_alpha, seed, allow_base_mismatch)
        experts = range(model.moelora.num_experts)
        return _rebuild(model, [*experts, None], [*model.moelora_config.expert_names, name], new)

    def replace_expert(
        self,
        name: str,
        *,
        adapter: Any = None,
        copy_of: str | None = None,
        noise: float = 0.0,
        r: int | None = None,
        lora_alpha: float | None = None,
        seed: int | None = None,
        allow_base_mismatch: bool = False,
    ) -> PoolChange:
        """Put a new trainable expert in the place of the one of this name; the arguments are
        `add_expert`'s.

        Raises:
            ValueError, TypeError: as `add_expert`, or an unknown name; the model is as it was then.
        """
        model: Any = self
        _check_free(model)
        index = model.moelora_config.expert_index(name)
        new = newcomer(model, adapter, copy_of, noise, r, lora_alpha, seed, allow_base_mismatch)
        keep = [None if e == index else e for e in range(model.moelora.num_experts)]
        return _rebuild(model, keep, model.moelora_config.expert_names, new)

    def remove_expert(self, name: str) -> PoolChange:
        """Remove an expert with its router rows; the others keep their bits. Returns as
        `add_expert`.

        Raises:
            ValueError: an unknown name, or fewer than num_experts_per_tok experts would remain.
        """
        model: Any = self
        _check_free(model)
        config = model.moelora_config
        index = config.expert_index(name)
        if config.num_experts <= config.num_experts_per_tok:
            raise ValueError(
                f"Expert {name!r} cannot be removed: {config.num_experts - 1} would remain, and every token chooses "
                f"num_experts_per_tok={config.num_experts_per_tok}. Load the checkpoint with a smaller one, or use "
                "replace_expert."
            )
        keep = [e for e in range(config.num_experts) if e != index]
        return _rebuild(model, keep, [config.expert_names[e] for e in keep], None)

    def freeze_experts(self, names: Iterable[str] | str) -> PoolChange:
        """Freeze these experts: no gradient, no optimizer state, no weight decay.

        Call it before making the optimizer, or hand what it returns to `resume_optimizer`.
        """
        return self._set_frozen(self._frozen() | self._indices(names))

    def unfreeze_experts(self, names: Iterable[str] | str) -> PoolChange:
        """Train these experts again; when to call it, and what it returns, is as with
        `freeze_experts`.
        """
        return self._set_frozen(self._frozen() - self._indices(names))

    def _indices(self, names: Iterable[str] | str) -> frozenset[int]:
        config: MoeLoraConfig = self.moelora_config  # type: ignore[attr-defined]
        names = [names] if isinstance(names, str) else names
        return frozenset(config.expert_index(name) for name in names)

    def _frozen(self) -> frozenset[int]:
        return next(self.moelora.factors()).frozen_experts  # type: ignore[attr-defined]

    def _set_frozen(self, experts: frozenset[int]) -> PoolChange:
        change, keep = PoolChange(), range(self.moelora.num_experts)  # type: ignore[attr-defined]
        for factor in self.moelora.factors():  # type: ignore[attr-defined]
            before = TrainedRows(factor)
            factor.set_frozen(experts)
            change.replaced_rows(before, factor, keep)
        return change


def _check_free(model: Any) -> None:
    if model.moelora.forcing is not None:
        raise ValueError("The experts cannot change inside use_experts(): leave it first.")


def _check_name(name: str, names: Sequence[str]) -> None:
    if problem := name_problem(name):
        raise ValueError(f"{problem[0].upper()}{problem[1:]}.")
    # Names that differ in case alone would share a folder on some file systems.
    if name.casefold() in {other.casefold() for other in names}:
        raise ValueError(
            f"There is an expert {name!r} already, among {', '.join(names)}: choose another name."
        )


def _rebuild(
    model: Any, keep: Sequence[int | None], names: Sequence[str], new: Newcomer | None
) -> PoolChange:
    """Make expert i the former `keep[i]`, or where None the newcomer: all is made first, and then
    put in.
    """
    mixture, change = model.moelora, PoolChange()
    config = _config(mixture, keep, names, new)
    routers = {name: _resized(router, keep, new) for name, router in mixture.routers.items()}
    load = copy.deepcopy(mixture.load)
    load.resize(keep)
    sites = []
    for site in mixture.sites.values():
        factors = [None if new is None else new.factors.get(name) for name in site.names]
        A = _restacked(site.lora_A, keep, [None if f is None else f[0] for f in factors], change)
        Bs = [
            _restacked(linear.lora_B, keep, [None if f is None else f[1]], change)
            for linear, f in zip(site.linears, factors)
        ]
        sites.append((site, A, Bs))
    for name, router in routers.items():
        change.replaced_router(mixture.routers[name], router, keep)
    # From here on nothing fails.
    for name, router in routers.items():
        mixture.routers[name] = router
    for site, A, Bs in sites:
        site.put_factors(config, A, Bs)
    mixture.config, mixture.load = config, load
    mixture.refresh()
    return change


def _config(
    mixture: Any, keep: Sequence[int | None], names: Sequence[str], new: Newcomer | None
) -> MoeLoraConfig:
    """The configuration of the changed mixture, checked; what single linears have stays what it is."""
    old: MoeLoraConfig = mixture.config
    made = copy.deepcopy(old)
    made.num_experts, made.expert_names = len(keep), list(names)
    for field in ("r", "lora_alpha"):
        each = [getattr(new, field) if e is None else old._per_expert(field)[e] for e in keep]
        setattr(made, field, each if len(set(each)) > 1 else each[0])
    made.expert_ranks, made.expert_scaling = {}, {}
    for linear in (name for site in mixture.sites.values() for name in site.names):
        own = None if new is None else new.factors.get(linear)
        ranks = [
            (0 if own is None else len(own[0])) if e is None else old.ranks_of(linear)[e]
            for e in keep
        ]
        usual = made.scaling
        scaling = [
            (usual[i] if own is None else own[2]) if e is None else old.scaling_of(linear)[e]
            for i, e in enumerate(keep)
        ]
        if tuple(ranks) != made.ranks:
            made.expert_ranks[linear] = ranks
        if tuple(scaling) != usual:
            made.expert_scaling[linear] = scaling
    made.expert_ranks, made.expert_scaling = made.expert_ranks or None, made.expert_scaling or None
    made.validate()
    return made


def _resized(router: Router, keep: Sequence[int | None], new: Newcomer | None) -> Router:
    """A resized copy of a router, whose scores have the right number."""
    made = copy.deepcopy(router)
    made.resize([(None if new is None else new.like) if e is None else e for e in keep])
    weight = next(made.parameters(), None)
    x = torch.zeros(1, made.in_features, device=None if weight is None else weight.device)
    try:
        with torch.no_grad():
            shape = tuple(made.score(x).shape)
    except RuntimeError as error:
        shape = error
    if shape != (1, made.num_choices):
        raise ValueError(
            f"{type(router).__name__} does not score {len(keep)} experts after resize() ({shape}): override resize "
            "where its parameters do not have one row an expert."
        )
    return made


def _restacked(
    factor: Factor, keep: Sequence[int | None], fresh: Sequence[Tensor | None], change: PoolChange
) -> Factor:
    """The factor with the experts `keep`, noted in `change`; `fresh` has a newcomer's rows, linear
    by linear.
    """
    made = factor.restacked(keep, fresh)
    change.replaced_rows(TrainedRows(factor), made, keep)
    return made
