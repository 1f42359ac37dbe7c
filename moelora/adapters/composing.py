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
from ..training.router_init import initialise
from ..validation import shown
from .preflight import Sources, preflight
from .reading import Adapter
from .writing import exact_targets

# What the adapters decide: a configuration beside them may repeat it, but not contradict it.
FROM_ADAPTERS = (
    *("num_experts", "expert_names", "r", "lora_alpha", "use_rslora"),
    *("expert_ranks", "expert_scaling", "target_modules", "layers_to_transform"),
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
    **kwargs: Any,
) -> Any:
    """Put trained PEFT LoRA adapters into their base as experts; see
    `MoeLoraForCausalLM.from_adapters`.
    """
    if config is None:
        config = MoeLoraConfig(router="arrow" if router_init == "arrow" else "top_k")
    elif not isinstance(config, MoeLoraConfig):
        raise TypeError(f"config is a {type(config).__name__}; expected a MoeLoraConfig.")
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
    composed.layers_to_transform = None
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
        composed.num_experts_per_tok = min(composed.num_experts_per_tok, composed.num_experts)
    composed.validate()
    return composed


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
