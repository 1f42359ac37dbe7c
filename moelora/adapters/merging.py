"""Merging experts: recipes over what they add, linear by linear.

A recipe is a function `(factors, weights, **options)` in `RECIPES`. It gets what each expert adds
to one linear, and answers with `LoraFactors` where the result has a low rank, else with the whole
ΔW `[d_out, d_in]`.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft.utils import merge_utils
from torch import Tensor

from ..core.experts import LoraFactors
from ..core.model import MixtureModel
from ..validation import check_number
from .deltas import compress, product, wide
from .randomness import seeded

Recipe = Callable[..., LoraFactors | Tensor]


@dataclass(frozen=True)
class MergeReport:
    """What `export_merged` wrote, and how far each linear's ΔW' is from the recipe's ΔW.

    An error is ‖ΔW' - ΔW‖ / ‖ΔW‖ in Frobenius norms, measured on what was written: it includes the
    rounding to the written dtype (about 1e-8 in fp32).

    Attributes:
        recipe: the recipe's name.
        weights: the weight of each expert, by its name.
        ranks: the rank that was written, by the linear's name.
        errors: the error by the linear's name.
        error: the error over all linears together.
    """

    recipe: str
    weights: dict[str, float]
    ranks: dict[str, int]
    errors: dict[str, float]
    error: float

    def __str__(self) -> str:
        low = min(self.ranks.values())
        high = max(self.ranks.values())
        ranks = f"rank {high}" if low == high else f"ranks {low} to {high}"
        worst = max(self.errors, key=self.errors.__getitem__)
        return (
            f"{self.recipe} of {len(self.weights)} experts: {ranks} in {len(self.ranks)} linears, "
            f"relative error {self.error:.2g} (largest {self.errors[worst]:.2g}, in {worst})"
        )


def concatenation(factors: Sequence[LoraFactors], weights: Sequence[float]) -> LoraFactors:
    """Σ w·s·Bᵀ·A exactly, as one LoRA of scaling 1: rows of A one expert after another, rows of B
    times w·s.
    """
    used = [(f, w) for f, w in zip(factors, weights) if w != 0]
    if not used:
        # Weights of 0 leave the zero delta, of rank 1.
        A, B = (torch.zeros_like(t[:1]) for t in (factors[0].A, factors[0].B))
        return LoraFactors(A, B, 1.0)
    A = torch.cat([wide(f.A) for f, _ in used])
    B = torch.cat([wide(f.B) * (w * f.scaling) for f, w in used])
    return LoraFactors(A, B, 1.0)


def svd(factors: Sequence[LoraFactors], weights: Sequence[float], *, rank: int) -> LoraFactors:
    """The best approximation of Σ w·s·Bᵀ·A that has this rank, in Frobenius norm."""
    return compress(concatenation(factors, weights), rank)


def ties(factors: Sequence[LoraFactors], weights: Sequence[float], *, density: float) -> Tensor:
    """TIES (arXiv:2306.01708): keep each ΔW's `density` largest values, elect signs, average what
    agrees.

    PEFT's implementation, linear by linear: signs are elected by the sums of the trimmed deltas
    without weights, and then w_e·ΔW_e is averaged over the experts that agree.
    """
    _check_density(density)
    with _no_warning_at_one():
        return merge_utils.ties(*_products(factors, weights), density)


def dare_linear(
    factors: Sequence[LoraFactors], weights: Sequence[float], *, density: float, seed: int
) -> Tensor:
    """DARE (arXiv:2311.03099): keep each value with probability `density`, divided by it, and add
    (PEFT's implementation).
    """
    _check_density(density)
    with _drawing(factors[0].A.device, seed), _no_warning_at_one():
        return merge_utils.dare_linear(*_products(factors, weights), density)


def dare_ties(
    factors: Sequence[LoraFactors], weights: Sequence[float], *, density: float, seed: int
) -> Tensor:
    """DARE's random values (arXiv:2311.03099), merged by TIES' signs (arXiv:2306.01708; PEFT's
    implementation).
    """
    _check_density(density)
    with _drawing(factors[0].A.device, seed), _no_warning_at_one():
        return merge_utils.dare_ties(*_products(factors, weights), density)


def breadcrumbs(
    factors: Sequence[LoraFactors], weights: Sequence[float], *, density: float, gamma: float = 0.01
) -> Tensor:
    """Model Breadcrumbs (arXiv:2312.06795): drop both tails of each ΔW's magnitudes, and add.

    gamma: the share of the largest that is dropped; of the smallest, as many as leave the share
    `density`.
    """
    _check_density(density)
    check_number("gamma", gamma, 0.0, 1.0, open_high=True)
    if density + gamma > 1 + 1e-9:
        raise ValueError(
            f"density={density} and gamma={gamma} keep and drop more than there is: expected "
            "density + gamma ≤ 1."
        )
    tensors, by_weight = _products(factors, weights)
    return merge_utils.task_arithmetic(
        [_without_tails(t, density, gamma) for t in tensors], by_weight
    )


RECIPES: dict[str, Recipe] = {
    "linear": concatenation,
    "concatenation": concatenation,
    "svd": svd,
    "ties": ties,
    "dare_linear": dare_linear,
    "dare_ties": dare_ties,
    "breadcrumbs": breadcrumbs,
}


def recipe_options(recipe: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """`options`, once it is sure that the recipe exists and that these are its options.

    Raises:
        ValueError: the recipe is unknown, or an option is unknown or missing.
    """
    if recipe not in RECIPES:
        raise ValueError(
            f"recipe={recipe!r} is unknown. The recipes are: {', '.join(sorted(RECIPES))}."
        )
    parameters = list(inspect.signature(RECIPES[recipe]).parameters.values())[2:]
    known = [p.name for p in parameters]
    unknown = sorted(set(options) - set(known))
    missing = [p.name for p in parameters if p.default is p.empty and p.name not in options]
    if unknown or missing:
        what = f"has no option {unknown}" if unknown else f"needs {', '.join(missing)}"
        raise ValueError(
            f"The recipe {recipe!r} {what}. Its options are: {', '.join(known) or 'none'}."
        )
    return dict(options)


def merged_deltas(
    model: MixtureModel, weights: Mapping[str, float], recipe: str, options: Mapping[str, Any]
) -> Iterator[tuple[str, LoraFactors | Tensor]]:
    """Each adapted linear's name and merged ΔW, one after another.

    A linear that none of the experts has is left out. Where the recipe draws, each linear has a
    seed of its own, which follows from `seed`.

    Args:
        model: a model with a mixture inside.
        weights: the weight of each expert, by its name.
        recipe: a name in `RECIPES`.
        options: the recipe's own options.
    """
    config = model.moelora_config
    experts = [model.moelora.expert(config.expert_index(name)) for name in weights]
    seeds = seeded(options.get("seed"))
    for linear in experts[0]:
        own = dict(options)
        if seeds is not None:
            own["seed"] = int(torch.randint(2**31, (), generator=seeds))
        there = [(e[linear], w) for e, w in zip(experts, weights.values()) if len(e[linear].A)]
        if there:
            with torch.no_grad():
                merged = RECIPES[recipe]([f for f, _ in there], [w for _, w in there], **own)
            yield linear, merged


def check_weights(model: MixtureModel, weights: Mapping[str, float]) -> dict[str, float]:
    """`weights` as floats, once it is sure that they weigh experts of `model`.

    Raises:
        TypeError: `weights` is not a mapping.
        ValueError: it is empty, or has an unknown name or a weight that is not a finite number.
    """
    if not isinstance(weights, Mapping):
        raise TypeError(
            f"weights is a {type(weights).__name__}; expected a weight for each expert's name."
        )
    names = model.moelora_config.expert_names or []
    if not weights:
        raise ValueError(f"weights is empty: give at least one of the experts: {', '.join(names)}.")
    for name, weight in weights.items():
        model.moelora_config.expert_index(name)
        check_number(f"weights[{name!r}]", weight, -float("inf"), float("inf"))
    return {name: float(weight) for name, weight in weights.items()}


def _without_tails(tensor: Tensor, density: float, gamma: float) -> Tensor:
    """`tensor` with zeros where its magnitude is among the largest or the smallest."""
    largest = int(gamma * tensor.numel())
    kept = min(int(density * tensor.numel()), tensor.numel() - largest)
    where = tensor.abs().flatten().topk(largest + kept).indices[largest:]
    sparse = torch.zeros_like(tensor).flatten()
    sparse[where] = tensor.flatten()[where]
    return sparse.view_as(tensor)


def _products(
    factors: Sequence[LoraFactors], weights: Sequence[float]
) -> tuple[list[Tensor], Tensor]:
    """Each expert's ΔW, and the weights as a tensor beside them."""
    tensors = [product(own) for own in factors]
    return tensors, tensors[0].new_tensor(weights)


def _check_density(density: float) -> None:
    check_number("density", density, 0.0, 1.0, open_low=True)


@contextmanager
def _drawing(device: torch.device, seed: int) -> Iterator[None]:
    """Inside, PEFT draws with this seed; the process' own random state is untouched."""
    seeded(seed)
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


@contextmanager
def _no_warning_at_one() -> Iterator[None]:
    """PEFT warns that density 1 prunes nothing, which is what it says."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The density")
        yield
