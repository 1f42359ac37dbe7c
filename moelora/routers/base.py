"""What every router is: hidden states in, the experts that act out, always computed in fp32."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from ..config import MoeLoraConfig
from ..registry import ROUTERS
from ..validation import MAX_WIDTH, check_integer
from .options import check_declared_options, read_options
from .products import weighted_sum

R = TypeVar("R", bound="Router")


class Routing(NamedTuple):
    """What a router decided for N rows (tokens, or sequences at sequence level).

    logits: `[N, E]` fp32 of E routed experts (with `null_expert` `[N, E + 1]`), before the softmax;
    −inf for an expert that is banned or that the layer does not have.
    expert_ids: `[N, K]` int64, −1 for no expert in this slot; shared experts have none.
    expert_weights: `[N, K]` fp32.
    """

    logits: Tensor
    expert_ids: Tensor
    expert_weights: Tensor

    def without(self, banned: Tensor) -> Routing:
        """The same with every slot of a banned expert left empty.

        Args:
            banned: which experts are banned, `[E]` bool.
        """
        return self._emptied((self.expert_ids < 0) | banned[self.expert_ids.clamp(min=0)])

    def _emptied(self, slots: Tensor) -> Routing:
        """The same with these slots (`[N, K]` bool) empty; the others keep their weights."""
        return self._replace(
            expert_ids=self.expert_ids.masked_fill(slots, -1),
            expert_weights=self.expert_weights.masked_fill(slots, 0.0),
        )


def _without_autocast(method: Callable) -> Callable:
    """Let a method of x compute in the dtypes that it names, also inside autocast."""

    @functools.wraps(method)
    def run(self: Router, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_autocast_enabled(x.device.type):
            return method(self, x, *args, **kwargs)
        with torch.autocast(x.device.type, enabled=False):
            return method(self, x, *args, **kwargs)

    return run


class Router(nn.Module):
    """Base class: `router(x) → Routing` among `num_choices` choices, the routed experts (without
    the shared ones) and after them perhaps the null expert.

    A subclass implements `score`, and `select` where it chooses otherwise. Its parameters are bare
    `nn.Parameter`s: PEFT's "all-linear" would adapt an `nn.Linear` inside.

    Options: a dataclass of the router's own settings, each with a type and a default; its
    `__post_init__` checks ranges. `MoeLoraConfig(router_options={…})` sets them, and the router
    reads them from `self.options`.
    changeable_options: those that may change when a checkpoint is loaded, because trained tensors
    mean the same under any value.
    expert_rows: the parameters and buffers that have one row a choice, by their names; `resize`
    moves their rows when experts come and go.
    shared_parameters: all other parameters and buffers, which `resize` leaves alone.
    reads: what it is given. "hidden_states": the rows below. "input_ids": token ids `[N]`, or of
    prompts `[B, S]`. "context": `router_context` of the sequences, `[B, n]`.
    reads_prompt: at token level too it must be told the prompt; see `HybridRouter`.
    fills_every_slot: it never leaves a slot empty (−1) nor names an expert twice in a row, so plans
    need not check. takes_any_dtype: `score` and `select` take x in any dtype, and compute in fp32
    all the same.
    decides_how_many: it decides row by row how many experts act; `num_experts_per_tok` is the most
    of them, by default all.
    takes_selection_bias: `select` chooses by a selection_bias, so that router_bias_update_rate can
    balance it. takes_null_expert: it can choose the null expert.
    backend: of `moelora_kernels`, as in `Mixture`.
    depth: of its decoder layer: 0 for the first, 1 for the last and outside of any.
    """

    @dataclass(frozen=True)
    class Options:
        """The settings of a router that has none of its own."""

    changeable_options: ClassVar[frozenset[str]] = frozenset()
    expert_rows: ClassVar[frozenset[str]] = frozenset()
    shared_parameters: ClassVar[frozenset[str]] = frozenset({"pool_query"})
    reads: ClassVar[str] = "hidden_states"
    reads_prompt: ClassVar[bool] = False
    fills_every_slot = False
    takes_any_dtype = False
    decides_how_many: ClassVar[bool] = False
    takes_selection_bias: ClassVar[bool] = True
    takes_null_expert: ClassVar[bool] = True
    backend: str | None = None
    depth = 0.0
    options: Options

    def __init__(self, config: MoeLoraConfig, in_features: int):
        super().__init__()
        self.options = self.read_options(config.router_options)
        self.num_experts = config.num_routed_experts
        self.null_expert = config.null_expert
        self.num_experts_per_tok = config.num_experts_per_tok
        self.norm_topk_prob = config.norm_topk_prob and config.num_experts_per_tok > 1
        self.jitter_noise = config.router_jitter_noise
        self.input_norm = config.router_input_norm
        self.pooling = config.router_pooling
        self.in_features = in_features
        self.fills_every_slot = self.fills_every_slot and not self.null_expert
        if self.pooling == "attention":
            # Zeros: the mean over the prompt, from which it learns.
            self.pool_query = nn.Parameter(torch.zeros(in_features))

    @classmethod
    def read_options(cls, given: object) -> Any:
        """This router's `Options`, checked.

        Args:
            given: a dict of options, all or some; None for all defaults.

        Raises:
            ValueError, TypeError: an unknown option, with the valid ones, or a value not valid.
        """
        return read_options(cls.Options, given, cls.__name__)

    @classmethod
    def check_config(cls, config: MoeLoraConfig) -> None:
        """Raise where a configuration asks for what this kind of router cannot do.

        Args:
            config: the configuration, whose fields are valid each by itself.

        Raises:
            ValueError: a field that this kind of router cannot follow, with the remedy.
        """
        if config.router_bias_update_rate and not cls.takes_selection_bias:
            raise ValueError(
                f"router_bias_update_rate={config.router_bias_update_rate} shifts which experts "
                f"are chosen, and router={config.router!r} does not choose by rank: leave it at 0 "
                "and balance with router_aux_loss_coef, or use router='top_k'."
            )
        if config.null_expert and not cls.takes_null_expert:
            raise ValueError(
                f"null_expert is one more choice, and router={config.router!r} leaves slots empty "
                "by itself, which could not be told from it: leave null_expert out, or use "
                "router='top_k' or 'soft'."
            )

    @property
    def num_choices(self) -> int:
        """The number of logits of a row."""
        return self.num_experts + int(self.null_expert)

    @property
    def num_slots(self) -> int:
        """How many slots a row of its routing has: one a choice where all experts may act."""
        return self.num_choices if self._may_use_all() else self.num_experts_per_tok

    def blank_rows(self, count: int, device: torch.device | None = None) -> Tensor:
        """Rows of zeros in the form that `score` takes.

        Args:
            count: how many.
            device: where.
        """
        return torch.zeros(count, self.in_features, device=device)

    def normalised(self, x: Tensor) -> Tensor:
        """x in fp32 (float64 stays); with router_input_norm x / √mean(x²).

        Args:
            x: hidden states `[…, d]` of any dtype.
        """
        x = x if x.dtype == torch.float64 else x.float()
        if not self.input_norm:
            return x
        return x * (x.square().mean(-1, keepdim=True) + torch.finfo(x.dtype).tiny).rsqrt()

    @_without_autocast
    def pool(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """A vector for each prompt, `[B, d]`, by router_pooling: its tokens' mean, the last one, or
        Σ_s a_s x_s, a = softmax_s(x_s · q / √d), q the learned query.

        Args:
            x: prompts `[B, S, d]` of any dtype.
            mask: which tokens belong to the prompts, `[B, S]` bool; None for all.
        """
        # Norms first: the first token of many models is a hundred times as large as the others.
        x = self.normalised(x)
        if self.pooling == "attention":
            scores = x @ self.pool_query.to(x.dtype) * x.shape[2] ** -0.5
            if mask is not None:
                # Not −inf: a row without a prompt would become NaN.
                scores = scores.masked_fill(~mask, torch.finfo(x.dtype).min)
            return weighted_sum(x, scores.softmax(1))
        if mask is None:
            return x[:, -1] if self.pooling == "last" else x.mean(1)
        if self.pooling == "last":
            # On whichever side the padding is.
            last = (torch.arange(x.shape[1], device=x.device) * mask).argmax(1)
            return x.take_along_dim(last[:, None, None], dim=1).squeeze(1)
        counted = mask.to(x.dtype)
        return weighted_sum(x, counted) / counted.sum(1, keepdim=True).clamp(min=1)

    def score(self, x: Tensor) -> Tensor:
        """The logits `[N, num_choices]` in fp32.

        Args:
            x: rows `[N, d]` in fp32 (in any dtype, with takes_any_dtype).
        """
        raise NotImplementedError

    def select(self, x: Tensor, logits: Tensor, selection_bias: Tensor | None) -> Routing:
        """The `num_experts_per_tok` choices of the largest probability, with those probabilities as
        weights.

        Args:
            x: the rows `[N, d]` that `score` read.
            logits: `[N, num_choices]` fp32.
            selection_bias: `[num_choices]`, shifts which are chosen, never their weights
                (arXiv:2408.15664).
        """
        if self.norm_topk_prob and selection_bias is None:
            # The same numbers as below with fewer operations: the softmax's own denominator
            # cancels.
            top, ids = logits.topk(self.num_experts_per_tok, dim=-1)
            return Routing(logits, ids, top.softmax(-1))
        probabilities = logits.softmax(-1)
        scores = probabilities if selection_bias is None else probabilities + selection_bias
        ids = scores.topk(self.num_experts_per_tok, dim=-1).indices
        weights = probabilities.gather(-1, ids)
        if self.norm_topk_prob:
            weights = weights / weights.sum(-1, keepdim=True)
        return Routing(logits, ids, weights)

    @_without_autocast
    def forward(
        self,
        x: Tensor,
        selection_bias: Tensor | None = None,
        banned: Tensor | None = None,
        *,
        prompt_mask: Tensor | None = None,
    ) -> Routing:
        """Route rows, or prompts that are pooled to one row each; under autocast too in fp32.

        Args:
            x: rows `[N, d]`, or prompts `[B, S, d]` (then N = B), of any dtype.
            selection_bias: `[num_choices]`, added to the probabilities when choosing.
            banned: who may not be chosen of the routed experts, `[E]` bool.
            prompt_mask: which tokens of the prompts count, `[B, S]` bool; None for all.
        """
        if x.dim() == 3:
            x = self.pool(x, prompt_mask)
        elif prompt_mask is not None:
            raise ValueError(f"prompt_mask is for prompts x [B, S, d]; x is {tuple(x.shape)}.")
        x = self._prepared(x)
        return self._decided(x, self.score(x), selection_bias, banned)

    def _prepared(self, x: Tensor) -> Tensor:
        """x `[N, d]` as `score` takes it: in fp32, normalised and, in training, with noise."""
        jitters = self.training and self.jitter_noise > 0
        if jitters or self.input_norm or not self.takes_any_dtype:
            x = self.normalised(x)
        if jitters:
            x = x * torch.empty_like(x).uniform_(1 - self.jitter_noise, 1 + self.jitter_noise)
        return x

    def _decided(
        self, x: Tensor, logits: Tensor, selection_bias: Tensor | None, banned: Tensor | None
    ) -> Routing:
        """What is chosen by the `logits` `[N, num_choices]` of prepared rows x `[N, d]`."""
        if banned is not None:
            choices = nn.functional.pad(banned, (0, int(self.null_expert)))
            logits = logits.masked_fill(choices, -torch.inf)
            # In the bias too: a probability of 0 plus another expert's bias could still win.
            bias = logits.new_zeros(self.num_choices) if selection_bias is None else selection_bias
            selection_bias = bias.masked_fill(choices, -torch.inf)
        routing = self.select(x, logits, selection_bias)
        if self.null_expert:
            routing = routing._emptied(routing.expert_ids == self.num_experts)
        return routing if banned is None else routing.without(banned)

    @torch.no_grad()
    def resize(self, keep: Sequence[int | None]) -> None:
        """Become a router of `len(keep)` experts.

        The rows of `expert_rows` move with their experts; a new expert's row is the mean of the
        kept experts' rows. A router that keeps its experts in another form overrides this.

        Args:
            keep: expert i is the former expert `keep[i]`, or a new one where that is None.

        Raises:
            ValueError: the class does not say of each parameter and buffer whether it has one row
                a choice.
        """
        kept = [former for former in keep if former is not None]
        for name, tensor in self._tensors_with_expert_rows().items():
            new = torch.zeros_like(tensor[0])
            if tensor.is_floating_point() and kept:
                new = tensor[kept].mean(0)
            resized = torch.stack([new if i is None else tensor[i] for i in self.with_null(keep)])
            if isinstance(tensor, nn.Parameter):
                resized = nn.Parameter(resized, requires_grad=tensor.requires_grad)
            owner, _, leaf = name.rpartition(".")
            setattr(self.get_submodule(owner), leaf, resized)
        uses_all = self._may_use_all()
        self.num_experts = len(keep)
        if uses_all:
            self.num_experts_per_tok = self.num_experts

    def with_null(self, keep: Sequence[int | None]) -> list[int | None]:
        """`keep` for rows: with `null_expert` the null expert's row follows the experts'.

        Args:
            keep: as in `resize`.
        """
        return [*keep, *([self.num_experts] if self.null_expert else [])]

    def _may_use_all(self) -> bool:
        """Whether a row may use all experts, however many there will be."""
        return self.decides_how_many and self.num_experts_per_tok >= self.num_experts

    def _tensors_with_expert_rows(self) -> dict[str, Tensor]:
        """The parameters and buffers in `expert_rows`; ValueError unless each is declared."""
        tensors = {**dict(self.named_parameters()), **dict(self.named_buffers())}
        problem = ""
        if undeclared := sorted(tensors.keys() - self.expert_rows - self.shared_parameters):
            problem = f"it declares nothing about its {', '.join(undeclared)}"
        for name in self.expert_rows:
            shape = tuple(tensors[name].shape) if name in tensors else None
            if shape is None:
                problem = f"{name} of expert_rows does not exist"
            elif shape[:1] != (self.num_choices,):
                problem = f"{name} of expert_rows is {shape}, for {self.num_choices} choices"
        if problem:
            raise ValueError(
                f"{type(self).__name__} cannot be resized: {problem}. Name what has one row a "
                "choice in expert_rows, all else in shared_parameters, or override resize."
            )
        return {name: tensors[name] for name in sorted(self.expert_rows)}


@dataclass(frozen=True)
class HiddenSize(Router.Options):
    """Settings of router="mlp" and "descriptor".

    Args:
        hidden_size: the number of hidden units, or of rows of the projection.
    """

    hidden_size: int = 64

    def __post_init__(self) -> None:
        check_integer("router_options['hidden_size']", self.hidden_size, 1, MAX_WIDTH)


def register_router(name: str) -> Callable[[type[R]], type[R]]:
    """Class decorator that makes a `Router` available as `MoeLoraConfig(router=name)`.

    Args:
        name: what configurations call it.

    Raises:
        ValueError: the name is taken by another class, or a default of its options is not valid.
        TypeError: the class is not a `Router`, or its `Options` are not a dataclass with defaults.
    """

    def register(cls: type[R]) -> type[R]:
        if not (isinstance(cls, type) and issubclass(cls, Router)):
            raise TypeError(f"@register_router({name!r}) takes a subclass of Router, not {cls!r}.")
        check_declared_options(cls)
        taken = ROUTERS.get(name, cls)
        # A module that is imported twice (a notebook cell run again) may replace itself.
        if (taken.__module__, taken.__qualname__) != (cls.__module__, cls.__qualname__):
            raise ValueError(f"{name!r} is taken by {taken.__module__}.{taken.__qualname__}.")
        ROUTERS[name] = cls
        return cls

    return register
