"""The covariance of a few tokens within their classes, shrunk so that it has an inverse."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# Directions of less variance than this share of the largest are rounding.
NEGLIGIBLE = 1e-6


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
