"""Routers that decide for each row how many experts act."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..config import MoeLoraConfig
from ..validation import MAX_WIDTH, check_integer, check_number
from .base import Router, Routing, register_router
from .top_k import TopKRouter

# How near to 1 the sparsity of `sparsegen` may be predicted, as in LD-MoLE.
EPSILON = 0.01


def every_choice(logits: Tensor) -> Tensor:
    """The numbers of all choices for each row of `logits`, in their order."""
    return torch.arange(logits.shape[-1], device=logits.device).expand_as(logits)


def _over_sum(weights: Tensor) -> Tensor:
    """Each row divided by its sum; a row of zeros stays."""
    return weights / weights.sum(-1, keepdim=True).clamp(min=torch.finfo(weights.dtype).tiny)


class DecidingRouter(TopKRouter):
    """Linear scores, of which a subclass makes a weight for each choice, 0 for those not used.

    `num_experts_per_tok` is the most that a row may use: the heaviest ones. `norm_topk_prob`
    divides what is kept by its sum.
    """

    fills_every_slot = False
    decides_how_many: ClassVar[bool] = True
    takes_selection_bias: ClassVar[bool] = False
    takes_null_expert: ClassVar[bool] = False

    def weigh(self, x: Tensor, logits: Tensor) -> Tensor:
        """The choices' weights `[N, num_choices]`, 0 for those not used.

        Args:
            x: the rows `[N, d]`, of any dtype.
            logits: `[N, num_choices]` fp32; −inf for a banned expert.
        """
        raise NotImplementedError

    def select(self, x: Tensor, logits: Tensor, selection_bias: Tensor | None) -> Routing:
        """The choices of a weight above 0; the selection bias, of bans alone, is in the logits."""
        weights = self.weigh(x, logits)
        if self.num_slots < self.num_choices:
            weights, ids = weights.topk(self.num_slots, dim=-1)
        else:
            ids = every_choice(logits)
        if self.norm_topk_prob:
            weights = _over_sum(weights)
        return Routing(logits, ids.masked_fill(weights <= 0, -1), weights)


@register_router("soft")
class SoftRouter(TopKRouter):
    """All experts act with the weights softmax(x Wᵀ / temperature), as in MoV and MoLoRA
    (arXiv:2309.05444).

    The balancing loss has no gradient here, since all experts are used alike.
    """

    @dataclass(frozen=True)
    class Options(Router.Options):
        """Settings of router="soft".

        Args:
            temperature: what the scores are divided by.
        """

        temperature: float = 1.0

        def __post_init__(self) -> None:
            name = "router_options['temperature']"
            check_number(name, self.temperature, 0.0, math.inf, open_low=True)

    options: Options
    decides_how_many: ClassVar[bool] = True
    takes_selection_bias: ClassVar[bool] = False

    @classmethod
    def check_config(cls, config: MoeLoraConfig) -> None:
        """As `Router`'s, and all experts must act."""
        super().check_config(config)
        if not config.may_use_all_experts:
            raise ValueError(
                f"num_experts_per_tok={config.num_experts_per_tok}, but router={config.router!r} "
                f"uses all {config.num_routed_experts} experts: leave num_experts_per_tok out, or "
                "use router='top_p' or 'top_k' for fewer."
            )

    def select(self, x: Tensor, logits: Tensor, selection_bias: Tensor | None) -> Routing:
        """Every choice in its own slot; the selection bias, of bans alone, is in the logits."""
        logits = logits / self.options.temperature
        ids = every_choice(logits)
        return Routing(logits, ids, logits.softmax(-1))


@register_router("top_p")
class TopPRouter(TopKRouter):
    """The fewest experts whose probabilities add up to p (arXiv:2403.07652).

    The paper weights them by their probabilities, which is norm_topk_prob=False. With
    norm_topk_prob a row that needs one expert only gives it the weight 1, from which the router
    learns nothing; the router losses and rows of several experts teach it. The paper's entropy loss
    is not part of it.
    """

    @dataclass(frozen=True)
    class Options(Router.Options):
        """Settings of router="top_p".

        Args:
            p: what the probabilities of a row's experts add up to at least.
        """

        p: float = 0.4

        def __post_init__(self) -> None:
            check_number("router_options['p']", self.p, 0.0, 1.0, open_low=True)

    options: Options
    changeable_options: ClassVar[frozenset[str]] = frozenset({"p"})
    fills_every_slot = False
    decides_how_many: ClassVar[bool] = True
    takes_null_expert: ClassVar[bool] = False

    def select(self, x: Tensor, logits: Tensor, selection_bias: Tensor | None) -> Routing:
        """The most probable choices, until their probabilities reach p; a selection bias shifts
        the order in which they come.
        """
        probabilities = logits.softmax(-1)
        if selection_bias is None:
            weights, ids = probabilities.topk(self.num_slots, dim=-1)
        else:
            ids = (probabilities + selection_bias).topk(self.num_slots, dim=-1).indices
            weights = probabilities.gather(-1, ids)
        with torch.no_grad():
            before = weights.cumsum(-1) - weights
            unused = before >= self.options.p
        weights = weights.masked_fill(unused, 0.0)
        if self.norm_topk_prob:
            weights = _over_sum(weights)
        return Routing(logits, ids.masked_fill(unused, -1), weights)


@register_router("threshold")
class ThresholdRouter(DecidingRouter):
    """max(p − τ(x), 0) over its sum, p = softmax(x Wᵀ), with the learned threshold
    τ(x) = τ_max · sigmoid(x · w + b) (AdaMoLE, arXiv:2405.00361).

    Up to τ_max = 1 / num_choices, the default, the most probable expert always acts; above it a row
    may have no expert at all. Without norm_topk_prob the weights are not divided by their sum.
    w `[1, d]` and b `[1]` begin at 0, τ at τ_max / 2.
    """

    @dataclass(frozen=True)
    class Options(Router.Options):
        """Settings of router="threshold".

        Args:
            max_threshold: τ_max, in (0, 1); None for 1 / num_choices, whatever that becomes.
        """

        max_threshold: float | None = None

        def __post_init__(self) -> None:
            if self.max_threshold is not None:
                name = "router_options['max_threshold']"
                check_number(name, self.max_threshold, 0.0, 1.0, open_low=True, open_high=True)

    options: Options
    shared_parameters = Router.shared_parameters | {"threshold_weight", "threshold_bias"}

    def __init__(self, config: MoeLoraConfig, in_features: int):
        super().__init__(config, in_features)
        self.threshold_weight = nn.Parameter(torch.zeros(1, in_features))
        self.threshold_bias = nn.Parameter(torch.zeros(1))

    def weigh(self, x: Tensor, logits: Tensor) -> Tensor:
        """max(softmax(logits) − τ(x), 0)."""
        score = self.product(x, self.threshold_weight) + self.threshold_bias.to(logits.dtype)
        largest = self.options.max_threshold or 1 / self.num_choices
        return (logits.softmax(-1) - largest * score.sigmoid()).relu()


@register_router("sparsegen")
class SparsegenRouter(DecidingRouter):
    """The point p of the simplex with the least |p − x Wᵀ|² − λ |p|²: differentiable, and sparse
    (sparsegen-lin, arXiv:1810.11975).

    λ < 1 is `sparsity`: 0 is the sparsemax, and the nearer to 1, the fewer experts act. With
    predicts_sparsity each row has its own λ(x) = 1 − ε − softplus(−f(x)) < 1, f a hidden layer of
    `hidden_size` units (LD-MoLE, arXiv:2509.25684, without its sparsity loss); λ begins near
    `sparsity`. Of a row that uses one expert, whose weight is 1, the router learns nothing.
    """

    @dataclass(frozen=True)
    class Options(Router.Options):
        """Settings of router="sparsegen".

        Args:
            sparsity: λ, below 1.
            predicts_sparsity: predict λ from each row.
            hidden_size: the number of hidden units of that prediction.
        """

        sparsity: float = 0.0
        predicts_sparsity: bool = False
        hidden_size: int = 64

        def __post_init__(self) -> None:
            name = "router_options['sparsity']"
            most = 1 - EPSILON if self.predicts_sparsity else 1.0
            check_number(name, self.sparsity, -math.inf, most, open_high=True)
            check_integer("router_options['hidden_size']", self.hidden_size, 1, MAX_WIDTH)

    options: Options
    shared_parameters = Router.shared_parameters | {
        "sparsity_hidden_weight",
        "sparsity_hidden_bias",
        "sparsity_weight",
        "sparsity_bias",
    }

    def __init__(self, config: MoeLoraConfig, in_features: int):
        super().__init__(config, in_features)
        if not self.options.predicts_sparsity:
            return
        width = self.options.hidden_size
        self.sparsity_hidden_weight = nn.Parameter(torch.empty(width, in_features))
        self.sparsity_hidden_bias = nn.Parameter(torch.zeros(width))
        self.sparsity_weight = nn.Parameter(torch.empty(1, width))
        nn.init.normal_(self.sparsity_hidden_weight, std=in_features**-0.5)
        # Small: the rows begin with nearly the same λ.
        nn.init.normal_(self.sparsity_weight, std=0.1 * width**-0.5)
        # softplus(−bias) = 1 − ε − sparsity.
        start = torch.tensor([1 - EPSILON - self.options.sparsity], dtype=torch.float64)
        self.sparsity_bias = nn.Parameter(-start.expm1().log().float())

    def weigh(self, x: Tensor, logits: Tensor) -> Tensor:
        """(logits − t) / (1 − λ) where that is positive, t such that the sum is 1."""
        rest = self.rest(x)
        with torch.no_grad():
            # The k largest are used while (1 − λ) + k z_k > Σ_{i ≤ k} z_i.
            ordered = logits.sort(dim=-1, descending=True).values
            numbers = torch.arange(1, self.num_choices + 1, device=logits.device)
            count = (rest + numbers * ordered > ordered.cumsum(-1)).sum(-1, keepdim=True)
            # At equal logits all of them are used.
            used = logits >= ordered.gather(-1, count.clamp(min=1) - 1)
        # Without −inf, whose gradients would be NaN.
        own = logits.masked_fill(~used, 0.0)
        mean = (own.sum(-1, keepdim=True) - rest) / used.sum(-1, keepdim=True)
        return ((own - mean) / rest).masked_fill(~used, 0.0).clamp(min=0.0)

    def rest(self, x: Tensor) -> Tensor | float:
        """1 − λ of each row `[N, 1]`, or of all."""
        if not self.options.predicts_sparsity:
            return 1 - self.options.sparsity
        hidden = self.product(x, self.sparsity_hidden_weight)
        hidden = (hidden + self.sparsity_hidden_bias.to(hidden.dtype)).relu()
        score = self.product(hidden, self.sparsity_weight) + self.sparsity_bias.to(hidden.dtype)
        return EPSILON + nn.functional.softplus(-score)
