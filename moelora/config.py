"""`MoeLoraConfig`: everything that defines a mixture, and the only place where its fields are
validated.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from transformers import PreTrainedConfig

from .validation import (
    check_by_linear,
    check_choice,
    check_flag,
    check_integer,
    check_number,
    check_regex,
    string_list,
)

FORMAT_VERSION = 1
ROUTING_LEVELS = ("token", "sequence")
ROUTER_SCOPES = ("projection", "site", "layer", "model")
# What routers, reports and label mappings call the choice of no expert.
NO_EXPERT = "(base)"
ROUTER_POOLINGS = ("mean", "last", "attention")
AUX_LOSS_WINDOWS = ("previous_step", "micro_batch")

# What PreTrainedConfig itself takes as extra keywords; everything else that is no field is a typo.
_INHERITED_KEYWORDS = {
    "name_or_path",
    "attn_implementation",
    "experts_implementation",
    "output_attentions",
    "torch_dtype",
    "model_type",
    "num_labels",
    "_commit_hash",
    "_attn_implementation_internal",
    "_experts_implementation_internal",
    "_name_or_path",
    "_output_attentions",
}


class MoeLoraConfig(PreTrainedConfig):
    """Configuration of a mixture of LoRA experts; the fields are the ones of PEFT's LoRA and
    Mixtral's MoE.

    Experts: `num_experts`, `r` and `lora_alpha` (one number, or one for each expert),
    `lora_dropout`, `use_rslora`, `expert_names` (default expert_0 …).
    `expert_ranks` and `expert_scaling` give every expert's rank (0: it is not there) and scaling
    for single linears, by their names; `from_adapters` fills them in.
    Where: `target_modules`, `layers_to_transform` and `modules_to_save`, matched as PEFT's
    `LoraConfig` does; `target_modules=None` takes PEFT's table, else all linears minus what PEFT
    refuses.
    Routing: `router` (a name in `ROUTERS`), `num_experts_per_tok`, `routing_level` ("token": each
    token its own experts; "sequence": one choice a sequence, from its prompt), `router_scope`
    ("projection": a router for each linear; "site": for the linears that read one tensor; "layer":
    for each decoder layer; "model": one, on the input of decoder layer `router_layer`, with experts
    in that layer and after), `router_prefix_tokens` (what a sequence router reads where every token
    is a label), `norm_topk_prob` (without effect at one expert a token, where the weight would be
    the constant 1), `router_jitter_noise`. `router_pooling`: how a sequence router makes one vector
    of the prompt ("mean"; "last": its last token; "attention": weighted by a learned query).
    `router_input_norm`: routers read each token divided by its root mean square.
    `router_hidden_size`: the width inside router="mlp" and "descriptor". `null_expert`: routers may
    choose "no expert" too, the base alone: one output more, after the experts'.
    Router losses: `router_aux_loss_coef` (load balancing, arXiv:2101.03961), `router_z_loss_coef`
    (arXiv:2202.08906), `expert_target_loss_coef` (cross-entropy on `expert_targets`), and
    `router_aux_loss_window`: whose tokens give the expert fractions of the balancing loss:
    "previous_step" (those of the previous optimizer step over all processes: additive over
    micro-batches) or "micro_batch" (the classic form: its gradient depends on how a batch is cut).
    `router_bias_update_rate` balances by a selection bias instead (arXiv:2408.15664).

    The fields that begin with `base_`, and `sites`, are filled in by `save_pretrained`.

    Raises:
        ValueError, TypeError: a field that does not exist, or a value out of range, with the valid
        ones.
    """

    model_type = "moelora"
    keys_to_ignore_at_inference = ["past_key_values"]

    num_experts: int = 8
    r: int | list[int] = 16
    lora_alpha: float | list[float] = 32
    lora_dropout: float = 0.0
    use_rslora: bool = False
    expert_names: list[str] | None = None
    expert_ranks: dict[str, list[int]] | None = None
    expert_scaling: dict[str, list[float]] | None = None
    target_modules: str | list[str] | None = None
    layers_to_transform: int | list[int] | None = None
    modules_to_save: list[str] | None = None

    router: str = "top_k"
    num_experts_per_tok: int = 2
    routing_level: str = "token"
    router_scope: str = "site"
    router_layer: int = 0
    router_prefix_tokens: int = 32
    router_pooling: str = "mean"
    router_input_norm: bool = False
    router_hidden_size: int = 64
    null_expert: bool = False
    norm_topk_prob: bool = True
    router_jitter_noise: float = 0.0
    router_aux_loss_coef: float = 0.01
    router_z_loss_coef: float = 0.001
    router_aux_loss_window: str = "previous_step"
    router_bias_update_rate: float = 0.0
    expert_target_loss_coef: float = 1.0

    format_version: int = FORMAT_VERSION
    base_config: dict | None = None
    base_architecture: str | None = None
    base_model_name_or_path: str | None = None
    base_revision: str | None = None
    base_folder: str | None = None
    base_subfolder: str | None = None
    sites: list[list[str]] | None = None

    def __post_init__(self, **kwargs):
        own = self.field_names()
        unknown = sorted(set(kwargs) - _INHERITED_KEYWORDS)
        if isinstance(self.format_version, int) and self.format_version > FORMAT_VERSION:
            raise ValueError(
                f"This configuration has format version {self.format_version}; this moelora reads up to "
                f"{FORMAT_VERSION}: upgrade moelora."
            )
        if unknown:
            raise ValueError(
                f"MoeLoraConfig has no field {unknown}. Its fields are: {', '.join(own)}."
            )
        kwargs.pop("model_type", None)
        super().__post_init__(**kwargs)
        if self.expert_names is None:
            check_integer("num_experts", self.num_experts, 1)
            self.expert_names = [f"expert_{e}" for e in range(self.num_experts)]
        self.validate()

    def validate(self) -> None:
        """Check every field; called at construction and again after keywords changed a loaded
        config.
        """
        for name, low in (
            ("num_experts", 1),
            ("num_experts_per_tok", 1),
            ("router_layer", 0),
            ("router_prefix_tokens", 1),
            ("router_hidden_size", 1),
            ("format_version", 0),
        ):
            check_integer(name, getattr(self, name), low)
        if self.num_experts_per_tok > self.num_experts:
            raise ValueError(
                f"num_experts_per_tok={self.num_experts_per_tok} is more than num_experts={self.num_experts}: "
                "a token cannot choose more experts than there are. Lower num_experts_per_tok."
            )
        for rank in self._per_expert("r"):
            check_integer("r", rank, 1)
        for alpha in self._per_expert("lora_alpha"):
            check_number("lora_alpha", alpha, 0.0, math.inf, open_low=True)
        experts, inf = self.num_experts, math.inf
        check_by_linear("expert_ranks", self.expert_ranks, experts, check_integer, 0)
        check_by_linear("expert_scaling", self.expert_scaling, experts, check_number, -inf, inf)
        check_number("lora_dropout", self.lora_dropout, 0.0, 1.0, open_high=True)
        check_number("router_jitter_noise", self.router_jitter_noise, 0.0, 1.0, open_high=True)
        for name in (
            "router_aux_loss_coef",
            "router_z_loss_coef",
            "router_bias_update_rate",
            "expert_target_loss_coef",
        ):
            check_number(name, getattr(self, name), 0.0, math.inf)
        for name in ("use_rslora", "norm_topk_prob", "router_input_norm", "null_expert"):
            check_flag(name, getattr(self, name))
        check_choice("routing_level", self.routing_level, ROUTING_LEVELS)
        check_choice("router_scope", self.router_scope, ROUTER_SCOPES)
        check_choice("router_pooling", self.router_pooling, ROUTER_POOLINGS)
        check_choice("router_aux_loss_window", self.router_aux_loss_window, AUX_LOSS_WINDOWS)
        self._check_router()
        self._check_names()
        self._check_targets()

    @classmethod
    def field_names(cls) -> list[str]:
        """The fields that are not inherited from `PreTrainedConfig`."""
        return [f.name for f in fields(cls) if f.name in MoeLoraConfig.__annotations__]

    def own_fields(self) -> dict[str, Any]:
        """What is saved: these fields alone; the inherited ones come and go with transformers'
        versions.
        """
        everything = self.to_dict()
        kept = ("model_type", "transformers_version", *self.field_names())
        return {name: everything[name] for name in kept if name in everything}

    def without_base(self) -> MoeLoraConfig:
        """A copy that says nothing about a base, for use with any."""
        made = copy.deepcopy(self)
        for name in self.field_names():
            if name.startswith("base_") or name == "sites":
                setattr(made, name, None)
        return made

    @property
    def ranks(self) -> tuple[int, ...]:
        """The rank of each expert, where `expert_ranks` has no other."""
        return tuple(int(r) for r in self._per_expert("r"))

    @property
    def scaling(self) -> tuple[float, ...]:
        """s_e = lora_alpha_e / r_e, or / sqrt(r_e) with `use_rslora` (arXiv:2312.03732), for each
        expert.
        """
        pairs = zip(self._per_expert("lora_alpha"), self.ranks)
        return tuple(a / (math.sqrt(r) if self.use_rslora else r) for a, r in pairs)

    @property
    def choice_names(self) -> list[str]:
        """What a router chooses among: the experts, and with `null_expert` after them `NO_EXPERT`."""
        return [*(self.expert_names or []), *([NO_EXPERT] if self.null_expert else [])]

    @property
    def num_choices(self) -> int:
        """How many outputs a router has: `num_experts`, and one more with `null_expert`."""
        return self.num_experts + int(self.null_expert)

    def ranks_of(self, linear: str) -> tuple[int, ...]:
        """The rank of each expert in the linear of this name."""
        own = (self.expert_ranks or {}).get(linear)
        return self.ranks if own is None else tuple(own)

    def scaling_of(self, linear: str) -> tuple[float, ...]:
        """s_e of each expert in the linear of this name."""
        own = (self.expert_scaling or {}).get(linear)
        return self.scaling if own is None else tuple(own)

    def expert_index(self, name: str) -> int:
        """The number of the expert called `name`; raises ValueError that lists the names there are."""
        names = self.expert_names or []
        if name not in names:
            raise ValueError(f"There is no expert {name!r}. The experts are: {', '.join(names)}.")
        return names.index(name)

    def _per_expert(self, name: str) -> Sequence:
        value = getattr(self, name)
        if not isinstance(value, (list, tuple)):
            return [value] * self.num_experts
        if len(value) != self.num_experts:
            raise ValueError(
                f"{name} lists {len(value)} values for num_experts={self.num_experts}: give one number for "
                "all experts, or a list with one for each."
            )
        return value

    def _check_router(self) -> None:
        from .routers.base import ROUTERS

        if not isinstance(self.router, str) or self.router not in ROUTERS:
            raise ValueError(
                f"router={self.router!r} is not registered. The routers are: {', '.join(sorted(ROUTERS))}. "
                "A new one is a class with @register_router(name)."
            )
        if self.router_pooling != "mean" and self.routing_level != "sequence":
            raise ValueError(
                f"router_pooling={self.router_pooling!r} makes one vector of a prompt, and routing_level="
                f"{self.routing_level!r} routes single tokens: leave it at 'mean', or use routing_level='sequence'."
            )

    def _check_names(self) -> None:
        names = string_list("expert_names", self.expert_names)
        if len(names) != self.num_experts or len(set(names)) != len(names):
            raise ValueError(
                f"expert_names={names} must be {self.num_experts} different names "
                f"(num_experts={self.num_experts})."
            )
        if NO_EXPERT in names:
            raise ValueError(
                f"expert_names contains {NO_EXPERT!r}, which stands for no expert: rename it."
            )
        self.expert_names = names

    def _check_targets(self) -> None:
        """The fields that PEFT matches; what is a set or tuple becomes a list, which JSON can hold."""
        targets, layers = self.target_modules, self.layers_to_transform
        if isinstance(targets, str):
            check_regex("target_modules", targets)
        elif targets is not None:
            self.target_modules = string_list("target_modules", targets)
        if self.modules_to_save is not None:
            self.modules_to_save = string_list(
                "modules_to_save", self.modules_to_save, may_be_empty=True
            )
        if layers is not None:
            numbers = list(layers) if isinstance(layers, (list, tuple, set)) else [layers]
            if not numbers:
                raise ValueError(
                    "layers_to_transform is empty: give layer numbers, or None for all layers."
                )
            for number in numbers:
                check_integer("layers_to_transform", number, 0)
            self.layers_to_transform = layers if isinstance(layers, int) else sorted(numbers)
        if self.sites is not None and not (
            isinstance(self.sites, list)
            and self.sites
            and all(isinstance(site, list) and string_list("sites", site) for site in self.sites)
        ):
            raise TypeError(
                f"sites={self.sites!r}: expected lists of module names; leave it to save_pretrained."
            )
