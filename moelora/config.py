"""`MoeLoraConfig`: everything that defines a mixture, and the only place where its fields are
validated.
"""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

from transformers import PreTrainedConfig

from .backtracking import check_regex
from .registry import router_class
from .validation import (
    MAX_EXPERTS,
    MAX_RANK,
    MAX_TOTAL_RANK,
    check_by_linear,
    check_choice,
    check_depth,
    check_flag,
    check_integer,
    check_names,
    check_number,
    check_type,
    expert_name_problem,
    shown,
    string_list,
)

FORMAT_VERSION = 1
ROUTING_LEVELS = ("token", "sequence")
ROUTER_SCOPES = ("projection", "site", "layer", "model")
ROUTER_POOLINGS = ("mean", "last", "attention")
AUX_LOSS_WINDOWS = ("previous_step", "micro_batch")
# What reports and label mappings call the null expert.
NO_EXPERT = "(base)"


def _check_optional(name: str, value: Any, kind: type = str, word: str = "string") -> None:
    if not isinstance(value, (kind, type(None))):
        raise TypeError(f"{name} is not a {word}, but {shown(value)}.")


_check_share = partial(check_number, low=0.0, high=1.0, open_high=True)
_check_coefficient = partial(check_number, low=0.0, high=math.inf)
# The checks of single fields, as data; those that say more than this are methods.
_CHECKS: dict[str, Callable[[str, Any], None]] = {
    "num_experts": partial(check_integer, low=1, high=MAX_EXPERTS),
    "num_experts_per_tok": partial(check_integer, low=1, high=MAX_EXPERTS),
    "router_layer": partial(check_integer, low=0),
    "router_prefix_tokens": partial(check_integer, low=1),
    "format_version": partial(check_integer, low=0, high=FORMAT_VERSION),
    "lora_dropout": _check_share,
    "router_jitter_noise": _check_share,
    "router_aux_loss_coef": _check_coefficient,
    "router_z_loss_coef": _check_coefficient,
    "router_bias_update_rate": _check_coefficient,
    "expert_target_loss_coef": _check_coefficient,
    "use_rslora": check_flag,
    "norm_topk_prob": check_flag,
    "router_input_norm": check_flag,
    "null_expert": check_flag,
    "routing_level": partial(check_choice, choices=ROUTING_LEVELS),
    "router_scope": partial(check_choice, choices=ROUTER_SCOPES),
    "router_pooling": partial(check_choice, choices=ROUTER_POOLINGS),
    "router_aux_loss_window": partial(check_choice, choices=AUX_LOSS_WINDOWS),
    "base_config": partial(_check_optional, kind=dict, word="dict"),
    "expert_sources": partial(_check_optional, kind=dict, word="dict"),
    "base_architecture": _check_optional,
    "base_model_name_or_path": _check_optional,
    "base_revision": _check_optional,
    "base_folder": _check_optional,
    "base_subfolder": _check_optional,
}
# What PreTrainedConfig itself takes as extra keywords; everything else that is no field is a typo.
_INHERITED_KEYWORDS = {
    *("name_or_path", "_name_or_path", "model_type", "num_labels", "torch_dtype", "_commit_hash"),
    *("attn_implementation", "_attn_implementation_internal"),
    *("experts_implementation", "_experts_implementation_internal", "auto_map"),
    *("output_attentions", "_output_attentions"),
}


class MoeLoraConfig(PreTrainedConfig):
    """Configuration of a mixture of LoRA experts; the fields are those of PEFT's LoRA and Mixtral.

    Args:
        num_experts: the number of experts.
        r: the rank: one for all experts, or a list with one for each.
        lora_alpha: scaling is lora_alpha / r: one for all experts, or a list with one for each.
        lora_dropout: the share of an adapted linear's input that is dropped in training.
        use_rslora: scale by lora_alpha / √r instead (arXiv:2312.03732).
        expert_names: the experts' names, fit for folders; by default expert_0, expert_1 …
        expert_ranks: single linears' ranks, one an expert (0: not there); set by `from_adapters`.
        expert_scaling: single linears' scalings, one an expert; set by `from_adapters`.
        expert_sources: by expert where it came from; set by what adds experts.
        target_modules: the linears to adapt, as in PEFT: names, a regex, "all-linear"; None: PEFT's
            table for the architecture, else all linears but those that PEFT refuses.
        layers_to_transform: the numbers of the layers to adapt, as in PEFT; None for all.
        modules_to_save: modules of the base that train and are saved too, as in PEFT.
        router: the kind of router, a name in `moelora.ROUTERS`.
        router_options: settings of this kind of router, by name; see its class's `Options`.
        num_experts_per_tok: how many experts each token (or sequence) uses.
        routing_level: "token": each token its own experts; "sequence": one choice from the prompt.
        router_scope: where routers are: "projection": for each linear; "site": for the linears that
            read one tensor; "layer": for each decoder layer; "model": one, at `router_layer`.
        router_layer: the decoder layer whose input the one router of "model" reads; experts are in
            that layer and after.
        router_prefix_tokens: how many tokens a sequence router reads where all tokens have labels.
        router_pooling: how a sequence router makes one vector of a prompt: its "mean", its "last"
            token, or "attention" with a learned query.
        router_input_norm: routers read each token divided by its root mean square.
        null_expert: routers may also choose the null expert: the base alone, after the experts.
        norm_topk_prob: divide the chosen experts' weights by their sum. It does nothing with one
            expert a token, whose weight would always be 1.
        router_jitter_noise: in training, multiply routers' inputs by noise in 1 ± this.
        router_aux_loss_coef: weight of the load-balancing loss (arXiv:2101.03961).
        router_z_loss_coef: weight of the z-loss, the squared logsumexp (arXiv:2202.08906).
        router_aux_loss_window: whose tokens give the balancing loss its expert fractions:
            "previous_step": those of the last optimizer step over all processes, so that the loss
            adds up over micro-batches; "micro_batch": the batch's own, the classic form, whose
            gradient depends on how a batch is cut.
        router_bias_update_rate: step of the bias that balances experts (arXiv:2408.15664).
        expert_target_loss_coef: weight of the cross-entropy on `expert_targets`.
        format_version: of the checkpoint; set by `save_pretrained`, as are all that follow.
        base_config: the base's own configuration.
        base_architecture: the name of the base's class.
        base_model_name_or_path: where the base is.
        base_revision: its revision on the hub.
        base_folder: where the base is inside the checkpoint, if it was saved too.
        base_subfolder: the folder of the base inside its repository.
        sites: the adapted linears that read one tensor, site by site.

    Raises:
        ValueError, TypeError: a field that does not exist, or a value of another type or out of
            range, with the valid ones.
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
    expert_sources: dict[str, str] | None = None
    target_modules: str | list[str] | None = None
    layers_to_transform: int | list[int] | None = None
    modules_to_save: list[str] | None = None

    router: str = "top_k"
    router_options: dict[str, Any] | None = None
    num_experts_per_tok: int = 2
    routing_level: str = "token"
    router_scope: str = "site"
    router_layer: int = 0
    router_prefix_tokens: int = 32
    router_pooling: str = "mean"
    router_input_norm: bool = False
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

    # Beside the fields, since transformers saves and compares all that lies in __dict__.
    __slots__ = ("as_read",)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As transformers'; remembers in `as_read` what it was before keywords changed it."""
        as_read = super().from_dict(copy.deepcopy(config_dict))
        made = super().from_dict(config_dict, **kwargs)
        config = made[0] if isinstance(made, tuple) else made
        config.as_read = as_read
        return made

    def __post_init__(self, **kwargs):
        for name, value in {**vars(self), **kwargs}.items():
            check_depth(name, value)
        # First, since a newer format may have fields that are not known here.
        version = self.format_version
        if isinstance(version, int) and version > FORMAT_VERSION:
            raise ValueError(
                f"This configuration has format version {shown(version)}; this moelora reads up to "
                f"{FORMAT_VERSION}: upgrade moelora."
            )
        if unknown := sorted(set(kwargs) - _INHERITED_KEYWORDS):
            raise ValueError(
                f"MoeLoraConfig has no field {shown(unknown)}. "
                f"Its fields are: {', '.join(self.field_names())}."
            )
        kwargs.pop("model_type", None)
        try:
            super().__post_init__(**kwargs)
        except AttributeError as error:
            # What transformers says of wrong types in its own fields, such as id2label or dtype.
            raise TypeError(f"A field of every configuration has a wrong type: {error}.") from error
        if self.expert_names is None:
            _CHECKS["num_experts"]("num_experts", self.num_experts)
            self.expert_names = [f"expert_{e}" for e in range(self.num_experts)]
        self.validate()

    def validate(self) -> None:
        """Check every field; called at construction and again after keywords changed a loaded
        config.
        """
        for name, check in _CHECKS.items():
            check(name, getattr(self, name))
        if self.num_experts_per_tok > self.num_experts:
            raise ValueError(
                f"num_experts_per_tok={self.num_experts_per_tok} is more than num_experts="
                f"{self.num_experts}: a token cannot choose more experts than there are. Lower "
                "num_experts_per_tok."
            )
        self._check_ranks()
        self._check_router()
        self._check_names()
        self._check_targets()

    @classmethod
    def field_names(cls) -> list[str]:
        """The fields that are not inherited from `PreTrainedConfig`."""
        return list(MoeLoraConfig.__annotations__)

    def own_fields(self) -> dict[str, Any]:
        """What is saved: these fields alone; the inherited ones come and go with transformers'
        versions.
        """
        everything = self.to_dict()
        kept = ("model_type", "transformers_version", *self.field_names())
        return {name: everything[name] for name in kept if name in everything}

    def without_base(self) -> MoeLoraConfig:
        """A copy that says nothing about a base, for use with any."""
        config = copy.deepcopy(self)
        for name in self.field_names():
            if name.startswith("base_") or name == "sites":
                setattr(config, name, None)
        return config

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
        """What a router chooses among: the experts, and after them perhaps the null expert."""
        return [*(self.expert_names or []), *([NO_EXPERT] if self.null_expert else [])]

    @property
    def num_choices(self) -> int:
        """How many outputs a router has: `num_experts`, and one more with `null_expert`."""
        return self.num_experts + int(self.null_expert)

    def ranks_of(self, linear: str) -> tuple[int, ...]:
        """The rank of each expert in one linear.

        Args:
            linear: its full name.
        """
        own = (self.expert_ranks or {}).get(linear)
        return self.ranks if own is None else tuple(own)

    def scaling_of(self, linear: str) -> tuple[float, ...]:
        """s_e of each expert in one linear.

        Args:
            linear: its full name.
        """
        own = (self.expert_scaling or {}).get(linear)
        return self.scaling if own is None else tuple(own)

    def expert_index(self, name: str) -> int:
        """The number of an expert.

        Args:
            name: the expert's name.

        Raises:
            ValueError: there is no such expert, with the names that there are.
        """
        names = self.expert_names or []
        check_names([name], names, "experts")
        return names.index(name)

    def _per_expert(self, name: str) -> Sequence:
        value = getattr(self, name)
        if not isinstance(value, (list, tuple)):
            return [value] * self.num_experts
        if len(value) != self.num_experts:
            raise ValueError(
                f"{name} lists {len(value)} values for num_experts={self.num_experts}: give one "
                "number for all experts, or a list with one for each."
            )
        return value

    def _check_ranks(self) -> None:
        """Ranks and scaling, of all linears and of single ones."""
        for rank in self._per_expert("r"):
            check_integer("r", rank, 1, MAX_RANK)
        for alpha in self._per_expert("lora_alpha"):
            check_number("lora_alpha", alpha, 0.0, math.inf, open_low=True)
        experts = self.num_experts
        inf = math.inf
        check_by_linear("expert_ranks", self.expert_ranks, experts, check_integer, 0, MAX_RANK)
        check_by_linear("expert_scaling", self.expert_scaling, experts, check_number, -inf, inf)
        for name, ranks in {"r": self.ranks, **(self.expert_ranks or {})}.items():
            if sum(ranks) > MAX_TOTAL_RANK:
                raise ValueError(
                    f"The ranks of {name} add up to {sum(ranks)}; expected at most "
                    f"{MAX_TOTAL_RANK}: lower r or num_experts."
                )

    def _check_router(self) -> None:
        options = router_class(self.router).read_options(self.router_options)
        self.router_options = asdict(options)
        if self.router_pooling != "mean" and self.routing_level != "sequence":
            raise ValueError(
                f"router_pooling={self.router_pooling!r} makes one vector of a prompt, and "
                f"routing_level={self.routing_level!r} routes single tokens: leave it at 'mean', "
                "or use routing_level='sequence'."
            )

    def _check_names(self) -> None:
        names = string_list("expert_names", self.expert_names)
        if len(names) != self.num_experts or len(set(names)) != len(names):
            raise ValueError(
                f"expert_names={shown(names)} must be {self.num_experts} different names "
                f"(num_experts={self.num_experts})."
            )
        if NO_EXPERT in names:
            raise ValueError(
                f"expert_names contains {NO_EXPERT!r}, which stands for the null expert: rename it."
            )
        for problem in filter(None, map(expert_name_problem, names)):
            raise ValueError(f"expert_names: {problem}.")
        counts = Counter(map(str.casefold, names))
        if alike := [repr(name) for name in names if counts[name.casefold()] > 1]:
            raise ValueError(
                f"expert_names contains {' and '.join(alike[:4])}, which differ in case alone, and "
                "some file systems would hold them in one folder: rename them."
            )
        self.expert_names = names

    def _check_targets(self) -> None:
        """The fields that name modules; sets and tuples become lists, which JSON can hold."""
        if isinstance(self.target_modules, str):
            check_regex("target_modules", self.target_modules)
        elif self.target_modules is not None:
            self.target_modules = string_list("target_modules", self.target_modules)
        if self.modules_to_save is not None:
            own = string_list("modules_to_save", self.modules_to_save, may_be_empty=True)
            self.modules_to_save = own
        layers = self.layers_to_transform
        if isinstance(layers, (list, tuple, set)):
            for number in layers:
                check_integer("layers_to_transform", number, 0)
            if not layers:
                raise ValueError("layers_to_transform is empty: give numbers, or None for all.")
            self.layers_to_transform = sorted(layers)
        elif layers is not None:
            check_integer("layers_to_transform", layers, 0)
        if self.sites is not None:
            is_list = isinstance(self.sites, list) and len(self.sites) > 0
            expected = "lists of module names; leave it to save_pretrained"
            check_type("sites", self.sites, is_list, expected)
            self.sites = [string_list("sites", site) for site in self.sites]
