"""One model from adapters that exist already: the configuration that they add up to, and their
tensors put in.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from os import PathLike
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..config import MoeLoraConfig
from .preflight import Sources, preflight
from .reading import Adapter, Target

# What the adapters say and a configuration given beside them may not say otherwise.
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


class FromAdapters:
    """What makes a mixture of PEFT adapters; every model class has it."""

    @classmethod
    def from_adapters(
        cls: Any,
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
        """Put trained PEFT LoRA adapters into their base as experts; all of them train unless they
        are frozen.

        adapters: by expert name a folder, hub id or `PeftModel`; or the folder of an X-LoRA
        checkpoint.
        config: the routing; ranks, scalings, names and targets come from the adapters.
        router_init, texts, tokenizer: where the routers begin, see
        `moelora.training.router_init.initialise`.
        allow_base_mismatch: take adapters that name another base. kwargs: for the base's
        `from_pretrained`.

        Raises:
            ValueError: an adapter that does not fit, with all that is wrong in a table; nothing is
            loaded then.
        """
        if config is None:
            config = MoeLoraConfig(router="arrow") if router_init == "arrow" else MoeLoraConfig()
        elif not isinstance(config, MoeLoraConfig):
            raise TypeError(f"config is a {type(config).__name__}; expected a MoeLoraConfig.")
        loaded = isinstance(base, PreTrainedModel)
        if loaded:
            cls._check_base(base)
        checked = preflight(
            base,
            adapters,
            allow_base_mismatch=allow_base_mismatch,
            auto_class=cls.auto_class,
            **kwargs,
        )
        checked.raise_if_bad()
        found = checked.adapters
        config = composed(config, found)
        model = cls._base_for(base, config, kwargs)
        if not loaded and any(adapter.saved for adapter in found.values()):
            # Copies of the base's own weights could not be compared before those were there.
            preflight(model, found, allow_base_mismatch=True).raise_if_bad()
        config.target_modules = unambiguous(list(config.target_modules or []), model)

        def then(made: Any) -> None:
            put_experts(made, found)
            from ..training.router_init import initialise

            initialise(made, router_init, texts, tokenizer)

        return cls.put_into(model, config, then=then)


def composed(config: MoeLoraConfig, adapters: Mapping[str, Adapter]) -> MoeLoraConfig:
    """A copy of `config` whose experts are these adapters.

    Each expert's most common rank and scaling become `r` and `lora_alpha`; a linear where any of
    them has another is listed in `expert_ranks` or `expert_scaling`.

    Raises:
        ValueError: the configuration says itself, and otherwise, what the adapters say.
    """
    made, default = config.without_base(), MoeLoraConfig()
    experts = list(adapters.values())
    made.num_experts, made.expert_names = len(experts), list(adapters)
    made.use_rslora = all(bool(adapter.config.get("use_rslora")) for adapter in experts)
    usual = [_usual(adapter, made.use_rslora) for adapter in experts]
    made.r = _one_or_list([rank for rank, _ in usual])
    made.lora_alpha = _one_or_list([alpha for _, alpha in usual])
    linears = list(dict.fromkeys(linear for adapter in experts for linear in adapter.targets))
    made.target_modules, made.layers_to_transform = linears, None
    made.expert_ranks, made.expert_scaling = {}, {}
    for linear in linears:
        targets = [adapter.targets.get(linear) for adapter in experts]
        ranks = [0 if t is None else t.r for t in targets]
        scaling = [s if t is None else t.scaling for t, s in zip(targets, made.scaling)]
        if tuple(ranks) != made.ranks:
            made.expert_ranks[linear] = ranks
        if tuple(scaling) != made.scaling:
            made.expert_scaling[linear] = scaling
    made.expert_ranks, made.expert_scaling = made.expert_ranks or None, made.expert_scaling or None
    default.expert_names = [f"expert_{e}" for e in range(config.num_experts)]
    for name in FROM_ADAPTERS:
        asked, is_so = getattr(config, name), getattr(made, name)
        if asked not in (getattr(default, name), is_so):
            raise ValueError(
                f"config.{name}={asked!r}, but the adapters make it {_short(is_so)}: leave it out of the "
                f"configuration. It gives the routing; {', '.join(FROM_ADAPTERS)} come from the adapters."
            )
    if made.num_experts_per_tok == default.num_experts_per_tok:
        made.num_experts_per_tok = min(made.num_experts_per_tok, made.num_experts)
    made.validate()
    return made


@torch.no_grad()
def put_experts(model: Any, adapters: Mapping[str, Adapter]) -> None:
    """Copy every expert's tensors into the mixture, bit for bit; `adapters` has all experts, by
    name.
    """
    experts = [adapters[name] for name in model.moelora_config.expert_names]
    for site in model.moelora.sites.values():
        shape = site.lora_A.stacked().shape
        whole_a = torch.zeros(shape, dtype=site.lora_A.stacked().dtype)
        whole_bs = [
            torch.zeros_like(linear.lora_B.stacked(), device="cpu") for linear in site.linears
        ]
        for expert, adapter in enumerate(experts):
            a_rows = site.lora_A.expert_rows(expert)
            for i, name in enumerate(site.names):
                if name not in adapter.targets:
                    continue
                A, B = adapter.factors(name)
                whole_a[a_rows[i]] = A.to("cpu", whole_a.dtype)
                (b_rows,) = site.linears[i].lora_B.expert_rows(expert)
                whole_bs[i][b_rows] = B.T.to("cpu", whole_a.dtype)
        site.lora_A.copy_(whole_a)
        for linear, whole_b in zip(site.linears, whole_bs):
            linear.lora_B.copy_(whole_b)


def factors_of(
    source: Any, model: PreTrainedModel, *, allow_base_mismatch: bool = False
) -> dict[str, tuple[Tensor, Tensor, float]]:
    """One adapter's A `[r, d_in]`, B `[r, d_out]` (rank-major, as `lora_B` is) and scaling, by
    linear of `model`.

    Raises:
        ValueError: the adapter does not fit the model, with all that is wrong.
    """
    checked = preflight(model, {"adapter": source}, allow_base_mismatch=allow_base_mismatch)
    checked.raise_if_bad()
    adapter = checked.adapters["adapter"]
    found = {}
    for linear, target in adapter.targets.items():
        A, B = adapter.factors(linear)
        found[linear] = (A, B.T.contiguous(), target.scaling)
    return found


def unambiguous(targets: Sequence[str], model: torch.nn.Module) -> str | list[str]:
    """`targets`, full names, such that PEFT's matching finds no other module, whose name merely
    ends like one.
    """
    exact = set(targets)
    for name, _ in model.named_modules():
        parts = name.split(".")
        if name not in exact and any(".".join(parts[i:]) in exact for i in range(1, len(parts))):
            return "|".join(map(re.escape, targets))
    return list(targets)


def _usual(adapter: Adapter, use_rslora: bool) -> tuple[int, float]:
    """The adapter's most common rank, and the alpha that gives its most common scaling at that
    rank.
    """
    rank = _most_common([target.r for target in adapter.targets.values()])
    alike: list[Target] = [target for target in adapter.targets.values() if target.r == rank]
    scaling = _most_common([target.scaling for target in alike])
    norm = math.sqrt(rank) if use_rslora else rank
    stated = adapter.config.get("lora_alpha")
    if isinstance(stated, (int, float)) and stated > 0 and stated / norm == scaling:
        return rank, stated
    # A negative or zero scaling has no alpha; its linears are listed one by one.
    return rank, scaling * norm if scaling > 0 else rank


def _most_common(values: list[Any]) -> Any:
    counts = Counter(values)
    return max(counts, key=lambda value: (counts[value], value))


def _one_or_list(values: list[Any]) -> Any:
    return values[0] if len(set(values)) == 1 else values


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
