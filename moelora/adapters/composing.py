"""One model from adapters that exist already: its configuration, and their tensors put in."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..config import MoeLoraConfig
from ..core.experts import LoraFactors
from ..core.model import MixtureModel
from ..injection.base import base_for, check_base
from ..injection.inject import put_into
from ..training.router_init import initialise
from ..validation import shown
from .preflight import Sources, preflight
from .reading import Adapter

# What the adapters decide: a configuration beside them may repeat it, but not contradict it.
FROM_ADAPTERS = (
    "num_experts",
    "expert_names",
    "r",
    "lora_alpha",
    "use_rslora",
    "expert_ranks",
    "expert_scaling",
    "target_modules",
    "layers_to_transform",
)


@dataclass
class ExpertShape:
    """An expert's ranks and scalings.

    Attributes:
        r: its usual rank.
        lora_alpha: its usual alpha.
        linears: its rank and scaling by the linear's full name, where it is there.
    """

    r: int
    lora_alpha: float
    linears: dict[str, tuple[int, float]]


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
        config = MoeLoraConfig(router="arrow") if router_init == "arrow" else MoeLoraConfig()
    elif not isinstance(config, MoeLoraConfig):
        raise TypeError(f"config is a {type(config).__name__}; expected a MoeLoraConfig.")
    loaded = isinstance(base, PreTrainedModel)
    if loaded:
        check_base(cls, base)
    checked = preflight(
        base, adapters, allow_base_mismatch=allow_base_mismatch, auto_class=cls.auto_class, **kwargs
    )
    checked.raise_if_bad()
    described = checked.adapters
    config = composed_config(config, described)
    model, _ = base_for(cls, base, config, kwargs)
    if not loaded and any(adapter.saved for adapter in described.values()):
        # Copies of the base's own weights could not be compared before those were there.
        preflight(model, described, allow_base_mismatch=True).raise_if_bad()
    config.target_modules = exact_targets(list(config.target_modules or []), model)

    def fill(mixture_model: Any) -> None:
        put_experts(mixture_model, described)
        initialise(mixture_model, router_init, texts, tokenizer)

    return put_into(model, config, cls, then=fill)


def composed_config(config: MoeLoraConfig, adapters: Mapping[str, Adapter]) -> MoeLoraConfig:
    """A copy of `config` whose experts are these adapters.

    Each expert's most common rank and scaling become `r` and `lora_alpha`. A linear where an expert
    has another rank or scaling is listed in `expert_ranks` or `expert_scaling`.

    Args:
        config: how the experts are routed.
        adapters: the described adapters by expert name.

    Raises:
        ValueError: the configuration contradicts the adapters.
    """
    composed = config.without_base()
    composed.use_rslora = all(bool(a.config.get("use_rslora")) for a in adapters.values())
    experts = [_shape_of(adapter, composed.use_rslora) for adapter in adapters.values()]
    linears = list(dict.fromkeys(linear for expert in experts for linear in expert.linears))
    composed.target_modules = linears
    composed.layers_to_transform = None
    set_experts(composed, list(adapters), experts, linears)
    default = MoeLoraConfig()
    default.expert_names = [f"expert_{e}" for e in range(config.num_experts)]
    for name in FROM_ADAPTERS:
        asked = getattr(config, name)
        actual = getattr(composed, name)
        if asked not in (getattr(default, name), actual):
            raise ValueError(
                f"config.{name}={asked!r}, but the adapters make it {shown(actual)}: leave it out "
                f"of the configuration. It gives the routing; {', '.join(FROM_ADAPTERS)} come from "
                "the adapters."
            )
    if composed.num_experts_per_tok == default.num_experts_per_tok:
        composed.num_experts_per_tok = min(composed.num_experts_per_tok, composed.num_experts)
    composed.validate()
    return composed


def set_experts(
    config: MoeLoraConfig,
    names: Sequence[str],
    experts: Sequence[ExpertShape],
    linears: Iterable[str],
) -> None:
    """Give a configuration other experts.

    A linear where an expert's rank or scaling is not the one that `r` and `lora_alpha` say is
    listed in `expert_ranks` or `expert_scaling`.

    Args:
        config: the configuration to change, in place; it is not validated.
        names: the experts' names.
        experts: the experts' ranks and scalings.
        linears: the full names of all adapted linears.
    """
    config.num_experts = len(experts)
    config.expert_names = list(names)
    config.r = _one_or_list([expert.r for expert in experts])
    config.lora_alpha = _one_or_list([expert.lora_alpha for expert in experts])
    usual_ranks = list(config.ranks)
    usual_scaling = list(config.scaling)
    expert_ranks = {}
    expert_scaling = {}
    for linear in linears:
        own = [e.linears.get(linear, (0, s)) for e, s in zip(experts, usual_scaling)]
        ranks = [rank for rank, _ in own]
        scaling = [s for _, s in own]
        if ranks != usual_ranks:
            expert_ranks[linear] = ranks
        if scaling != usual_scaling:
            expert_scaling[linear] = scaling
    config.expert_ranks = expert_ranks or None
    config.expert_scaling = expert_scaling or None


@torch.no_grad()
def put_experts(model: MixtureModel, adapters: Mapping[str, Adapter]) -> None:
    """Copy every expert's tensors into the mixture, bit for bit.

    Args:
        model: a model whose mixture was made for these adapters.
        adapters: all experts by name.
    """
    for expert, name in enumerate(model.moelora_config.expert_names or []):
        for linear, own in model.moelora.expert(expert).items():
            if linear in adapters[name].targets:
                A, B = adapters[name].factors(linear)
                own.A.copy_(A)
                own.B.copy_(B.T)


def adapter_factors(
    source: Any, model: PreTrainedModel, *, allow_base_mismatch: bool = False
) -> dict[str, LoraFactors]:
    """One adapter's factors by the full name of the linear.

    Args:
        source: a source of `read_adapter`.
        model: the base, or a model with a mixture inside.
        allow_base_mismatch: the adapter may name another base.

    Raises:
        ValueError: the adapter does not fit the model, with all that is wrong.
    """
    checked = preflight(model, {"adapter": source}, allow_base_mismatch=allow_base_mismatch)
    checked.raise_if_bad()
    adapter = checked.adapters["adapter"]
    factors = {}
    for linear, target in adapter.targets.items():
        A, B = adapter.factors(linear)
        factors[linear] = LoraFactors(A, B.T.contiguous(), target.scaling)
    return factors


def exact_targets(linears: Sequence[str], model: nn.Module) -> str | list[str]:
    """target_modules by which PEFT finds these linears and no others.

    PEFT also takes a module whose name ends like one in a list. Where the model has such a module,
    the answer is a regular expression of the full names.

    Args:
        linears: full names of linears.
        model: the base that has them.
    """
    wanted = set(linears)
    for name, _ in model.named_modules():
        parts = name.split(".")
        ends = (".".join(parts[i:]) for i in range(1, len(parts)))
        if name not in wanted and any(end in wanted for end in ends):
            return "|".join(map(re.escape, linears))
    return list(linears)


def _shape_of(adapter: Adapter, use_rslora: bool) -> ExpertShape:
    """The adapter's most common rank, and the alpha of its most common scaling at that rank."""
    linears = {name: (target.r, target.scaling) for name, target in adapter.targets.items()}
    r = _most_common([rank for rank, _ in linears.values()])
    scaling = _most_common([s for rank, s in linears.values() if rank == r])
    norm = math.sqrt(r) if use_rslora else r
    # A negative or zero scaling has no alpha; its linears are listed one by one.
    alpha = scaling * norm if scaling > 0 else r
    stated = adapter.config.get("lora_alpha")
    if isinstance(stated, (int, float)) and stated > 0 and stated / norm == scaling:
        alpha = stated
    return ExpertShape(r, alpha, linears)


def _most_common(values: list[Any]) -> Any:
    counts = Counter(values)
    return max(counts, key=lambda value: (counts[value], value))


def _one_or_list(values: list[Any]) -> Any:
    return values[0] if len(set(values)) == 1 else values
