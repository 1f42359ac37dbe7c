"""A router by description: it compares its input with a descriptor of each expert, which is made
from a few of the expert's texts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..config import MoeLoraConfig
from .base import HiddenSize, Router, register_router
from .products import product

# The covariance of a few texts is uncertain: this share of the estimate is a multiple of the
# identity instead.
SHRINKAGE = 0.5
TEMPERATURE = 10.0
MAX_TEMPERATURE = 100.0
# The squared length, as a share of the descriptors' mean one, under which a descriptor has hardly a
# direction: what is left of it is rounding.
SOFTNESS = 1e-4
# Directions of less variance than this share of the largest are rounding.
NEGLIGIBLE = 1e-6


@register_router("descriptor")
class DescriptorRouter(Router):
    """τ cos(P (x − c), P (D_e − c)) of the input x and each expert's descriptor D_e, where c is the
    mean of the descriptors that were given.

    A model is scored by a representation of itself together with the instruction, as in Model-SAT
    (arXiv:2502.17282) and EmbedLLM (arXiv:2410.02223). An expert's descriptor is the mean of what
    the router reads of the expert's texts. Both sides of the cosine pass through one projection P,
    so a new expert is chosen by its descriptor alone, without training.

    Descriptors D `[num_choices, d]` are buffers, random until `describe` sets them;
    P `[hidden_size, d]` and log τ `[1]` train. A choice without a descriptor, among others that
    have one, scores 0 and is hardly ever chosen. With router_pooling="attention" a descriptor
    depends on the query as it was then: describe again after training it.
    """

    Options = HiddenSize
    options: HiddenSize
    fills_every_slot = True
    expert_rows: ClassVar[frozenset[str]] = frozenset({"descriptors", "described"})
    shared_parameters = Router.shared_parameters | {"projection", "log_temperature"}
    descriptors: Tensor
    described: Tensor

    def __init__(self, config: MoeLoraConfig, in_features: int):
        super().__init__(config, in_features)
        choices = config.num_choices
        # The cosine does not depend on the size of the entries. With entries of size 1, training at
        # usual learning rates turns the projection only a little, so that it goes on telling apart
        # what the experts trained so far do not need, but a new one may.
        self.projection = nn.Parameter(torch.randn(self.options.hidden_size, in_features))
        self.log_temperature = nn.Parameter(torch.tensor([TEMPERATURE]).log())
        self.register_buffer("descriptors", torch.randn(choices, in_features))
        self.register_buffer("described", torch.zeros(choices, dtype=torch.bool))

    def score(self, x: Tensor) -> Tensor:
        """τ cos(P (x − c), P (D − c)): x `[N, d]` → `[N, num_choices]`."""
        projection = self.projection.to(x.dtype)
        descriptors = self.descriptors.to(x.dtype)
        # No branches, which would wait for the device. While nothing is described, all (random)
        # descriptors count, and c is 0: inputs may be much smaller than the descriptors, whose mean
        # would drown them.
        described = self.described.to(x.dtype)[:, None]
        centre = (descriptors * described).sum(0) / described.sum().clamp(min=1)
        counted = (self.described | ~self.described.any()).to(x.dtype)[:, None]
        rows = product((descriptors - centre) * counted, projection, self.backend)
        shortest = rows.square().sum(1).mean() * SOFTNESS
        projected = product(x - centre, projection, self.backend)
        cosine = product(_direction(projected), _direction(rows, shortest), self.backend)
        return cosine * self.log_temperature.to(x.dtype).exp().clamp(max=MAX_TEMPERATURE)

    @torch.no_grad()
    def describe(self, inputs: dict[int, Tensor], fit: bool | None = None) -> None:
        """Set the descriptors of these choices to the means of their inputs; other rows keep their
        bits.

        Args:
            inputs: what the router reads of each choice's texts, `[n, d]`, by the choice's number.
            fit: begin with a new projection, made for these inputs (see `fitted_projection`); by
                default where no choice has a descriptor yet.
        """
        fit = not bool(self.described.any()) if fit is None else fit
        for choice, x in inputs.items():
            self.descriptors[choice] = x.mean(0).to(self.descriptors)
            self.described[choice] = True
        if fit:
            projection = fitted_projection(list(inputs.values()), len(self.projection))
            self.projection.copy_(projection.to(self.projection))
            self.log_temperature.fill_(torch.tensor(TEMPERATURE).log())


def _direction(x: Tensor, shortest: Tensor | float = 0.0) -> Tensor:
    """x `[N, p]` over √(its squared length + shortest): what is nearly 0 stays nearly 0."""
    return x * (x.square().sum(1, keepdim=True) + shortest + 1e-12).rsqrt()


def fitted_projection(classes: list[Tensor], width: int) -> Tensor:
    """P `[width, d]` with entries of size 1 such that PᵀP ∝ Σ⁻¹ as nearly as its width allows, Σ
    the covariance within the classes.

    The first rows span the directions Σ^(−1/2)(μ_e − μ), in which these classes differ: their
    scores are those of the full Σ⁻¹. The other rows are random in the rest of the space
    (Johnson–Lindenstrauss), in which descriptors that come later may differ. `classes` are the
    inputs of each class, `[n_e, d]`.
    """
    means, deviations = class_means(classes)
    apart = times_covariance_power(means - means.mean(0), deviations, -0.5, SHRINKAGE)
    _, sizes, directions = torch.linalg.svd(apart, full_matrices=False)
    count = min(int((sizes > 1e-4 * sizes[0].clamp(min=1e-12)).sum()), width // 2)
    directions = directions[:count]
    # A generator of its own: the same texts give the same bits at any time.
    generator = torch.Generator().manual_seed(0)
    rest = torch.randn(width - count, means.shape[1], generator=generator) / (width - count) ** 0.5
    rest = rest - rest @ directions.T @ directions
    rows = torch.cat([directions, rest])
    projection = times_covariance_power(rows, deviations, -0.5, SHRINKAGE)
    return projection / projection.square().mean().sqrt().clamp(min=1e-12)


def class_means(classes: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """The means `[E, d]` of classes `[n_e, d]`, and all rows less their own, `[Σ n_e, d]`."""
    means = torch.stack([x.mean(0) for x in classes])
    deviations = torch.cat([x - mean for x, mean in zip(classes, means, strict=True)])
    return means, deviations


def times_covariance_power(
    rows: Tensor, deviations: Tensor, power: float, shrinkage: float
) -> Tensor:
    """rows Σ^power, with Σ = (1 − λ) XᵀX / n + λ v I shrunk to its mean variance v.

    Of few tokens in a large space XᵀX alone has no inverse. Σ is λ v I but in the span of X, so the
    smaller one of XᵀX and XXᵀ is decomposed. rows `[m, d]`; deviations X `[n, d]`; power −1 for
    linear discriminants, −1/2 to whiten; shrinkage λ in (0, 1].
    """
    n, d = deviations.shape
    x = deviations * ((1 - shrinkage) / n) ** 0.5
    ridge = shrinkage * float(deviations.square().mean().clamp(min=1e-12))
    if d <= n:
        variances, axes = torch.linalg.eigh(x.T @ x)
    else:
        variances, vectors = torch.linalg.eigh(x @ x.T)
        present = variances > NEGLIGIBLE * variances[-1].clamp(min=1e-12)
        variances = variances[present]
        axes = x.T @ vectors[:, present] / variances.sqrt()
    along = (variances.clamp(min=0) / ridge + 1) ** power - 1
    return (rows + (rows @ axes * along) @ axes.T) * ridge**power
