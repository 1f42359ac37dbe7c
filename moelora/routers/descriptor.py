"""A router by description: it compares what it reads with a descriptor of each expert, made of a
few texts of it.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..config import MoeLoraConfig
from .base import Router, register_router
from .covariance import class_means, times_covariance_power

# What the covariance of the few texts at hand is mixed with of a multiple of the identity.
SHRINKAGE = 0.5
TEMPERATURE = 10.0
MAX_TEMPERATURE = 100.0
# Vectors shorter than a hundredth of the descriptors' mean length count as short, not as
# directions.
SOFTNESS = 1e-4


@register_router("descriptor")
class DescriptorRouter(Router):
    """τ cos(P (x − c), P (D_e − c)) of the input x and each expert's descriptor D_e, c the mean of
    those given.

    A model is scored by a representation of itself together with the instruction, as in Model-SAT
    (arXiv:2502.17282) and EmbedLLM (arXiv:2410.02223). The descriptor is what the router reads of
    the expert's texts, on average, and both sides share one projection, so a new expert is chosen
    by its descriptor alone, without training. Descriptors D `[num_choices, d]` are buffers, random
    until `describe` sets them; P `[router_hidden_size, d]` and log τ `[1]` train. A choice without
    a descriptor among others that have one scores 0 and is hardly ever chosen. With
    router_pooling="attention" descriptors belong to the query of their time: describe again after
    training it.
    """

    fills_every_slot = True
    shared_parameters = Router.shared_parameters | {"projection", "log_temperature"}
    descriptors: Tensor
    described: Tensor

    def __init__(self, config: MoeLoraConfig, in_features: int):
        super().__init__(config, in_features)
        choices = config.num_choices
        # Entries of size 1, the cosine being indifferent to it: at usual learning rates training
        # then turns the projection little, and what it knows beyond the trained experts, which a
        # newcomer needs, stays.
        self.projection = nn.Parameter(torch.randn(config.router_hidden_size, in_features))
        self.log_temperature = nn.Parameter(torch.tensor([TEMPERATURE]).log())
        self.register_buffer("descriptors", torch.randn(choices, in_features))
        self.register_buffer("described", torch.zeros(choices, dtype=torch.bool))

    def score(self, x: Tensor) -> Tensor:
        """τ cos(P (x − c), P (D − c)): x `[N, d]` → `[N, num_choices]`."""
        projection, descriptors = self.projection.to(x.dtype), self.descriptors.to(x.dtype)
        # No branches, which would wait for the device. While none is described all count, from 0:
        # inputs may be much smaller than random descriptors, and would be lost beside the mean of
        # those.
        described = self.described.to(x.dtype)[:, None]
        centre = (descriptors * described).sum(0) / described.sum().clamp(min=1)
        counted = (self.described | ~self.described.any()).to(x.dtype)[:, None]
        rows = ((descriptors - centre) * counted) @ projection.T
        shortest = rows.square().sum(1).mean() * SOFTNESS
        cosine = _direction((x - centre) @ projection.T) @ _direction(rows, shortest).T
        return cosine * self.log_temperature.to(x.dtype).exp().clamp(max=MAX_TEMPERATURE)

    @torch.no_grad()
    def describe(self, inputs: dict[int, Tensor], fit: bool | None = None) -> None:
        """Set the descriptors of these choices to the means of their inputs `[n, d]`; other rows
        keep their bits.

        fit: begin with a new projection, made for these inputs (see `fitted_projection`); by
        default where no choice has a descriptor yet.
        """
        fit = not bool(self.described.any()) if fit is None else fit
        for choice, x in inputs.items():
            self.descriptors[choice] = x.mean(0).to(self.descriptors)
            self.described[choice] = True
        if fit:
            made = fitted_projection(list(inputs.values()), len(self.projection))
            self.projection.copy_(made.to(self.projection))
            self.log_temperature.fill_(torch.tensor(TEMPERATURE).log())


def _direction(x: Tensor, shortest: Tensor | float = 0.0) -> Tensor:
    """x `[N, p]` over its length, which counts as at least √shortest: what is 0 but for rounding
    has no direction.
    """
    return x * (x.square().sum(1, keepdim=True) + shortest + 1e-12).rsqrt()


def fitted_projection(classes: list[Tensor], width: int) -> Tensor:
    """P `[width, d]` with entries of size 1 such that PᵀP ∝ Σ⁻¹ as nearly as its width allows;
    classes: `[n_e, d]`.

    Σ is the covariance within the classes. First come the directions Σ^(−1/2)(μ_e − μ), in which
    the classes at hand differ, so their scores are those of the full Σ⁻¹; the other rows are random
    in the rest of the space (Johnson–Lindenstrauss), where descriptors that come later differ.
    """
    means, deviations = class_means(classes)
    apart = times_covariance_power(means - means.mean(0), deviations, -0.5, SHRINKAGE)
    _, sizes, directions = torch.linalg.svd(apart, full_matrices=False)
    count = min(int((sizes > 1e-4 * sizes[0].clamp(min=1e-12)).sum()), width // 2)
    directions = directions[:count]
    # Of its own: one description gives the same bits at any time.
    generator = torch.Generator().manual_seed(0)
    rest = torch.randn(width - count, means.shape[1], generator=generator) / (width - count) ** 0.5
    rest = rest - rest @ directions.T @ directions
    made = times_covariance_power(torch.cat([directions, rest]), deviations, -0.5, SHRINKAGE)
    return made / made.square().mean().sqrt().clamp(min=1e-12)
