"""One model from adapters that exist already: its configuration, and their tensors put in."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from statistics import multimode
from typing import Any

import torch
from peft import LoraConfig
from transformers import PreTrainedModel

from ..config import MoeLoraConfig
from ..core.experts import LoraFactors
from ..core.model import MixtureModel
from ..injection.base import base_for
from ..injection.inject import put_into
from ..placement import check_lora
from ..training.router_init import initialise
from ..validation import shown
from .preflight import Sources, preflight
from .reading import Adapter
from .splitting import split_adapter
from .writing import exact_targets

# Rules that are written out, for each linear and layer, when a mixture is made.
BY_RULE = ("rank_pattern", "alpha_pattern", "experts_per_layer", "layer_experts")
# What the adapters decide: a configuration beside them may repeat it, but not contradict it.
FROM_ADAPTERS = (
    *("num_experts", "expert_names", "r", "lora_alpha", "use_rslora"),
    *("expert_ranks", "expert_scaling", "target_modules", "layers_to_transform"),
    *BY_RULE,
    "expert_init",
)


@dataclass
class ExpertShape:
    """An expert's usual rank and alpha, and its rank and scaling by the full name of the linear."""

    r: int
    lora_alpha: float
    linears: Mapping[str, tuple[int, float]]


def from_adapters(
    cls: type[MixtureModel],
    base: str | PathLike[str] | PreTrainedModel,
    adapters: Sources,
    config: MoeLoraConfig | None = None,
    *,
    allow_base_mismatch: bool = False,
    router_init: str = "random",
    texts: Mapping[str, Any] | None = None,
    tokenizer: Callable[..., Any] | None = None,
    split: str | None = None,
    noise: float | None = None,
    seed: int | None = None,
    **kwargs: Any,
) -> Any:
    """Put trained PEFT LoRA adapters into their base as experts; see
    `MoeLoraForCausalLM.from_adapters`.
    """
    if config is None:
        config = MoeLoraConfig(router="arrow" if router_init == "arrow" else "top_k")
    elif not isinstance(config, MoeLoraConfig):
        raise TypeError(f"config is a {type(config).__name__}; expected a MoeLoraConfig.")
    check_lora(config, "from_adapters")
    if split is not None:
        adapters = _split(adapters, config, split, noise, seed)
    elif (noise, seed) != (None, None):
        raise ValueError("noise and seed are for split='copy': leave them out.")
    checked = preflight(
        base, adapters, allow_base_mismatch=allow_base_mismatch, auto_class=cls.auto_class, **kwargs
    )
    checked.raise_if_bad()
    described = checked.adapters
    config = composed_config(config, described)
    model, _ = base_for(cls, base, config, kwargs)
    if model is not base and any(adapter.saved for adapter in described.values()):
        # Copies of the base's own weights could not be compared before those were there.
        preflight(model, described, allow_base_mismatch=True).raise_if_bad()
    config.target_modules = exact_targets(model, config.target_modules or [], LoraConfig())

    @torch.no_grad()
    def fill(mixture_model: Any) -> None:
        for expert, adapter in enumerate(described.values()):
            own = mixture_model.moelora.expert(expert)
            for linear, factors in _factors(adapter):
                own[linear].A.copy_(factors.A)
                own[linear].B.copy_(factors.B)
        initialise(mixture_model, router_init, texts, tokenizer)

    return put_into(model, config, cls, then=fill)


def _split(source: Any, config: MoeLoraConfig, *how: Any) -> dict[str, Adapter]:
    """The experts of `config` as the parts of one adapter."""
    method, noise, seed = how
    if config.share_lora_A and (method, noise) != ("copy", 0):
        raise ValueError(
            f"share_lora_A=True, and split={method!r} gives each expert an A of its own: use "
            "split='copy' with noise=0.0, or leave share_lora_A out."
        )
    if isinstance(source, Mapping):
        raise TypeError(
            f"split={method!r} makes experts of one adapter, and adapters is a "
            f"{type(source).__name__}: pass its folder, hub id or PeftModel alone."
        )
    return split_adapter(source, config.expert_names or [], method, noise=noise, seed=seed)


def composed_config(config: MoeLoraConfig, adapters: Mapping[str, Adapter]) -> MoeLoraConfig:
    """A copy of `config`, which says how the experts are routed, whose experts are these adapters;
    ValueError where it contradicts them.
    """
    composed = config.without_base()
    composed.use_rslora = all(bool(a.config.get("use_rslora")) for a in adapters.values())
    experts = [
        usual_shape(
            {name: (target.r, target.scaling) for name, target in adapter.targets.items()},
            composed.use_rslora,
            stated=adapter.config.get("lora_alpha"),
        )
        for adapter in adapters.values()
    ]
    composed.target_modules = list(dict.fromkeys(n for expert in experts for n in expert.linears))
    for name in ("layers_to_transform", *BY_RULE):
        setattr(composed, name, None)
    composed.expert_init = "kaiming"
    set_experts(composed, list(adapters), experts, composed.target_modules)
    composed.expert_sources = {name: adapter.source for name, adapter in adapters.items()}
    default = MoeLoraConfig()
    default.expert_names = [f"expert_{e}" for e in range(config.num_experts)]
    for name in FROM_ADAPTERS:
        asked = getattr(config, name)
        actual = getattr(composed, name)
        if asked not in (getattr(default, name), actual):
            raise ValueError(
                f"config.{name}={asked!r}, but the adapters make it {shown(actual)}: leave it out, "
                f"since {', '.join(FROM_ADAPTERS)} come from the adapters."
            )
    if composed.num_experts_per_tok == default.num_experts_per_tok:
        routed = max(1, composed.num_routed_experts)
        composed.num_experts_per_tok = min(composed.num_experts_per_tok, routed)
    composed.validate()
    if composed.share_lora_A:
        _check_shared(adapters)
    return composed


def _check_shared(adapters: Mapping[str, Adapter]) -> None:
    """Raise ValueError unless the adapters, of the same ranks, have the same A in every linear."""
    (first, like), *others = adapters.items()
    for name, adapter in others:
        for linear in like.targets:
            if not torch.equal(adapter.factors(linear)[0], like.factors(linear)[0]):
                raise ValueError(
                    f"share_lora_A=True, and {name!r} has another A of {linear} than {first!r}: "
                    "experts share one A only where the adapters do. Leave share_lora_A out."
                )


def set_experts(
    config: MoeLoraConfig,
    names: Sequence[str],
    experts: Sequence[ExpertShape],
    linears: Sequence[str],
) -> None:
    """Give a configuration, which is not validated, other experts in these adapted linears.

    A linear where an expert's rank or scaling is not the one that `r` and `lora_alpha` say is
    listed in `expert_ranks` or `expert_scaling`.
    """
    if config.may_use_all_experts:
        # All of the new ones, which `validate` counts.
        config.num_experts_per_tok = None  # type: ignore[assignment]
    config.num_experts = len(experts)
    config.expert_names = list(names)
    config.r = _one_or_list([expert.r for expert in experts])
    config.lora_alpha = _one_or_list([expert.lora_alpha for expert in experts])
    usual_ranks = list(config.ranks)
    usual_scaling = list(config.scaling)
    ranks = {n: [e.linears.get(n, (0, 0))[0] for e in experts] for n in linears}
    scaling = {
        n: [e.linears.get(n, (0, s))[1] for e, s in zip(experts, usual_scaling)] for n in linears
    }
    config.expert_ranks = {n: own for n, own in ranks.items() if own != usual_ranks} or None
    config.expert_scaling = {n: own for n, own in scaling.items() if own != usual_scaling} or None


def _factors(adapter: Adapter) -> Iterator[tuple[str, LoraFactors]]:
    for linear, target in adapter.targets.items():
        A, B = adapter.factors(linear)
        yield linear, LoraFactors(A, B.T.contiguous(), target.scaling)


def adapter_factors(
    source: Any, model: PreTrainedModel, *, allow_base_mismatch: bool = False
) -> dict[str, LoraFactors]:
    """The factors of a source of `read_adapter` by the full name of the linear; ValueError, with
    all that is wrong, where it does not fit `model`.
    """
    checked = preflight(model, {"adapter": source}, allow_base_mismatch=allow_base_mismatch)
    checked.raise_if_bad()
    return dict(_factors(checked.adapters["adapter"]))


def usual_shape(
    linears: Mapping[str, tuple[int, float]], use_rslora: bool, stated: Any = None
) -> ExpertShape:
    """The shape of an expert with these ranks and scalings: its most common rank, and the alpha of
    its most common scaling at that rank, which is `stated` where that gives the same.
    """
    r = max(multimode(rank for rank, _ in linears.values()))
    scaling = max(multimode(s for rank, s in linears.values() if rank == r))
    norm = math.sqrt(r) if use_rslora else r
    if isinstance(stated, (int, float)) and stated > 0 and stated / norm == scaling:
        return ExpertShape(r, stated, linears)
    # A negative or zero scaling has no alpha; its linears are listed one by one.
    return ExpertShape(r, scaling * norm if scaling > 0 else r, linears)


def _one_or_list(values: list[Any]) -> Any:
    return values[0] if len(set(values)) == 1 else values
