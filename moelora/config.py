"""`MoeLoraConfig`: everything that defines a mixture, and the only place where its fields are
validated; the checks themselves are in `config_checks`.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from transformers import PreTrainedConfig

from .backtracking import check_regex
from .config_checks import (
    FIELD_CHECKS,
    FORMAT_VERSION,
    NO_EXPERT,
    check_choices,
    check_patterns,
    check_ranks,
    check_reads,
    checked_layer_counts,
    checked_layers,
    checked_names,
    per_expert,
)
from .placement import check_placement, checked_blocks
from .registry import router_class
from .validation import check_depth, check_names, check_type, shown, string_list

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
        num_shared_experts: the last so many of them act on every token with weight 1, and routers
            choose among the others (arXiv:2401.06066). What names experts (`use_experts`, exports,
            merges) takes those that it names and no others.
        experts_per_layer: how many of the routed experts the decoder layers have, the first so many
            (arXiv:2402.08562): a list, stretched over the layers in equal groups, or "increasing",
            "decreasing" or "hourglass". Shared experts are in every layer.
        r: the rank: one for all experts, or a list with one for each.
        lora_alpha: scaling is lora_alpha / r: one for all experts, or a list with one for each.
        rank_pattern: r of single linears, by the end of the name or a regex, as in PEFT.
        alpha_pattern: lora_alpha of single linears, likewise.
        lora_dropout: the share of an adapted linear's input that is dropped in training.
        expert_dropout: the share of rows (tokens or sequences) that in training do without an
            expert that acts on them, whose weight in all other rows is divided by 1 − this: one
            number for all experts, or a list with one for each. Forced experts are never dropped.
        use_rslora: scale by lora_alpha / √r instead (arXiv:2312.03732).
        share_lora_A: all experts of a linear share one A, and each has its own B (HydraLoRA,
            arXiv:2404.19245); while an expert is frozen, so is A.
        expert_init: how A begins in `from_base` and `add_expert` (B is 0): "kaiming", random as in
            PEFT; "orthogonal", experts' rows are slices of one random orthogonal matrix; "svd",
            slices of the frozen weight's right singular vectors (see `moelora.core.expert_init`).
        expert_names: the experts' names, fit for folders; by default expert_0, expert_1 …
        expert_ranks: single linears' ranks, one an expert (0: not there); set by `from_adapters`,
            by patterns and by layers.
        expert_scaling: single linears' scalings, one an expert; set likewise.
        expert_sources: by expert where it came from; set by what adds experts.
        layer_experts: the numbers of the routed experts that single decoder layers have, by the
            layer's full name; set by `experts_per_layer`.
        target_modules: the linears to adapt, as in PEFT: names, a regex, "all-linear"; None: PEFT's
            table for the architecture, else all linears but those that PEFT refuses.
        layers_to_transform: the numbers of the layers to adapt, as in PEFT; None for all.
        target_blocks: modules that are no linears, as "mlp", and spans of modules, as "fc1->fc2":
            experts read what goes in and are added to what comes out (arXiv:2110.04366). Without
            target_modules beside it no linears are adapted.
        expert_activation: φ between A and B, which makes LoRA a bottleneck adapter: "relu", "gelu"
            (exact), "silu" or "tanh"; None for LoRA (arXiv:2304.01933).
        expert_placement: "parallel": experts read what their module reads; "series": what it gives,
            y + Σ w s φ(y Aᵀ) B (arXiv:1902.00751), and so do routers of their own.
        modules_to_save: modules of the base that train and are saved too, as in PEFT.
        router: the kind of router, a name in `moelora.ROUTERS`.
        router_options: settings of this kind of router, by name; see its class's `Options`.
        num_experts_per_tok: how many experts each token (or sequence) uses; by default 2. Of
            routers that decide that themselves it is the most, by default all experts.
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
        base_config: the base's own configuration, with how it was quantised when it was loaded.
        base_architecture: the name of the base's class.
        base_model_name_or_path: where the base is.
        base_revision: its revision on the hub, by which the model card knows that it is there.
        base_folder: where the base is inside the checkpoint, if it was saved too.
        base_subfolder: the folder of the base inside its repository.
        sites: the adapted linears that read one tensor, site by site.
        block_sizes: of each block in `sites` the width of what its experts read and of what it
            gives, by its name.

    Raises:
        ValueError, TypeError: a field that does not exist, or a value of another type or out of
            range, with the valid ones.
    """

    model_type = "moelora"
    keys_to_ignore_at_inference = ["past_key_values"]

    num_experts: int = 8
    num_shared_experts: int = 0
    experts_per_layer: str | list[int] | None = None
    r: int | list[int] = 16
    lora_alpha: float | list[float] = 32
    rank_pattern: dict[str, int | list[int]] | None = None
    alpha_pattern: dict[str, float | list[float]] | None = None
    lora_dropout: float = 0.0
    expert_dropout: float | list[float] = 0.0
    use_rslora: bool = False
    share_lora_A: bool = False
    expert_init: str = "kaiming"
    expert_names: list[str] | None = None
    expert_ranks: dict[str, list[int]] | None = None
    expert_scaling: dict[str, list[float]] | None = None
    layer_experts: dict[str, list[int]] | None = None
    expert_sources: dict[str, str] | None = None
    target_modules: str | list[str] | None = None
    layers_to_transform: int | list[int] | None = None
    target_blocks: list[str] | None = None
    expert_activation: str | None = None
    expert_placement: str = "parallel"
    modules_to_save: list[str] | None = None

    router: str = "top_k"
    router_options: dict[str, Any] | None = None
    # None only until `validate` has counted.
    num_experts_per_tok: int = None  # type: ignore[assignment]
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
    block_sizes: dict[str, list[int]] | None = None

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
            FIELD_CHECKS["num_experts"]("num_experts", self.num_experts)
            self.expert_names = [f"expert_{e}" for e in range(self.num_experts)]
        self.validate()

    def validate(self) -> None:
        """Check every field; called at construction and again after keywords changed a loaded
        config.
        """
        for name, check in FIELD_CHECKS.items():
            check(name, getattr(self, name))
        self.experts_per_layer = checked_layer_counts(self.experts_per_layer)
        decides = router_class(self.router).decides_how_many
        if self.num_experts_per_tok is None:
            self.num_experts_per_tok = max(self.num_routed_experts, 1) if decides else 2
        check_choices(vars(self), decides)
        check_ranks(vars(self))
        check_patterns(vars(self))
        # As PEFT's default, which says nothing.
        self.rank_pattern = self.rank_pattern or None
        self.alpha_pattern = self.alpha_pattern or None
        self._check_router()
        self.expert_names = checked_names(self.expert_names, self.num_experts)
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
            if name.startswith("base_") or name in ("sites", "block_sizes"):
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
        return self.scaling_by(self._per_expert("lora_alpha"), self.ranks)

    def scaling_by(self, alphas: Sequence[float], ranks: Sequence[int]) -> tuple[float, ...]:
        """s_e of experts with these alphas and ranks.

        Args:
            alphas: one an expert.
            ranks: one an expert.
        """
        pairs = zip(alphas, ranks, strict=True)
        return tuple(a / (math.sqrt(r) if self.use_rslora else r) for a, r in pairs)

    @property
    def num_routed_experts(self) -> int:
        """How many experts routers choose among: all but the last `num_shared_experts`."""
        return self.num_experts - self.num_shared_experts

    @property
    def routed_expert_names(self) -> list[str]:
        """The experts that routers choose among."""
        return (self.expert_names or [])[: self.num_routed_experts]

    @property
    def shared_expert_names(self) -> list[str]:
        """The experts that act on every token."""
        return (self.expert_names or [])[self.num_routed_experts :]

    @property
    def choice_names(self) -> list[str]:
        """What a router chooses among: the routed experts, and after them perhaps the null
        expert.
        """
        return [*self.routed_expert_names, *([NO_EXPERT] if self.null_expert else [])]

    @property
    def num_choices(self) -> int:
        """How many outputs a router has: one a routed expert, and one more with `null_expert`."""
        return self.num_routed_experts + int(self.null_expert)

    @property
    def may_use_all_experts(self) -> bool:
        """Whether the router decides how many experts a token uses, and may take all of them."""
        decides = router_class(self.router).decides_how_many
        return decides and self.num_experts_per_tok == self.num_routed_experts

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
        return per_expert(name, getattr(self, name), self.num_experts)

    @property
    def reads_prompts(self) -> bool:
        """Whether the routers must be told which tokens of a sequence are its prompt."""
        router = router_class(self.router)
        if router.reads == "context":
            return False
        return self.routing_level == "sequence" or router.reads_prompt

    @property
    def routes_tokens(self) -> bool:
        """Whether each token has a routing of its own, not its sequence's."""
        return self.routing_level == "token" and router_class(self.router).reads != "context"

    def _check_router(self) -> None:
        router = router_class(self.router)
        self.router_options = asdict(router.read_options(self.router_options))
        check_reads(router, vars(self))
        router.check_config(self)
        if self.router_pooling != "mean" and not self.reads_prompts:
            raise ValueError(
                f"router_pooling={self.router_pooling!r} makes one vector of a prompt, and "
                f"routing_level={self.routing_level!r} routes single tokens: leave it at 'mean', "
                "or use routing_level='sequence'."
            )

    def _check_targets(self) -> None:
        """The fields that name modules; sets and tuples become lists, which JSON can hold."""
        if isinstance(self.target_modules, str):
            check_regex("target_modules", self.target_modules)
        elif self.target_modules is not None:
            self.target_modules = string_list("target_modules", self.target_modules)
        if self.modules_to_save is not None:
            own = string_list("modules_to_save", self.modules_to_save, may_be_empty=True)
            self.modules_to_save = own
        self.layers_to_transform = checked_layers(self.layers_to_transform)
        self.target_blocks = checked_blocks(self.target_blocks)
        check_placement(vars(self))
        if self.sites is not None:
            is_list = isinstance(self.sites, list) and len(self.sites) > 0
            expected = "lists of module names; leave it to save_pretrained"
            check_type("sites", self.sites, is_list, expected)
            self.sites = [string_list("sites", site) for site in self.sites]
