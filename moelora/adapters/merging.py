"""Merging experts: recipes over their deltas, linear by linear, and the best approximation of a low
rank.

A recipe is a function `(deltas, weights, **options)` in `RECIPES`. It gets the deltas of one linear
and answers with a `Delta` where what it makes has a low rank, else with the whole ΔW `[d_out,
d_in]`.
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

from ..validation import check_integer, check_number
from .deltas import Delta, adapted, compress, delta_of, wide

Recipe = Callable[..., Delta | Tensor]


@dataclass(frozen=True)
class MergeReport:
    """What `export_merged` wrote: each linear's rank, and how far its ΔW is from the recipe's, ‖ΔW'
    - ΔW‖ / ‖ΔW‖.

    The error is measured on what was written, so it holds the rounding to the written dtype too
    (about 1e-8 in fp32). error: the same ratio of Frobenius norms over all linears together.
    """

    recipe: str
    weights: dict[str, float]
    ranks: dict[str, int]
    errors: dict[str, float]
    error: float

    def __str__(self) -> str:
        low, high = min(self.ranks.values()), max(self.ranks.values())
        ranks = f"rank {high}" if low == high else f"ranks {low} to {high}"
        worst = max(self.errors, key=self.errors.__getitem__)
        return (
            f"{self.recipe} of {len(self.weights)} experts: {ranks} in {len(self.ranks)} linears, "
            f"relative error {self.error:.2g} (largest {self.errors[worst]:.2g}, in {worst})"
        )


def concatenation(deltas: Sequence[Delta], weights: Sequence[float]) -> Delta:
    """Σ w·s·B·A exactly, as one LoRA: A rows one expert after another, B columns times w·s, scaling
    1.
    """
    used = [(d, w) for d, w in zip(deltas, weights) if w != 0] or [(_nothing(deltas[0]), 0.0)]
    A = torch.cat([wide(d.A) for d, _ in used])
    return Delta(A, torch.cat([wide(d.B) * (w * d.scaling) for d, w in used], dim=1))


def svd(deltas: Sequence[Delta], weights: Sequence[float], *, rank: int) -> Delta:
    """The best approximation of Σ w·s·B·A that has this rank, in Frobenius norm."""
    return compress(concatenation(deltas, weights), rank)


def ties(deltas: Sequence[Delta], weights: Sequence[float], *, density: float) -> Tensor:
    """TIES (arXiv:2306.01708): keep each ΔW's `density` largest values, elect signs, average what
    agrees.

    PEFT's implementation, linear by linear: signs are elected by the sums of the trimmed deltas
    without weights, and then w_e·ΔW_e is averaged over the experts that agree.
    """
    _check_density(density)
    with _no_warning_at_one():
        return merge_utils.ties(*_full(deltas, weights), density)


def dare_linear(
    deltas: Sequence[Delta], weights: Sequence[float], *, density: float, seed: int
) -> Tensor:
    """DARE (arXiv:2311.03099): keep each value with probability `density`, divided by it, and add.
    PEFT's.
    """
    _check_density(density)
    with _drawing(deltas[0].A.device, seed), _no_warning_at_one():
        return merge_utils.dare_linear(*_full(deltas, weights), density)


def dare_ties(
    deltas: Sequence[Delta], weights: Sequence[float], *, density: float, seed: int
) -> Tensor:
    """DARE's random values (arXiv:2311.03099), merged by TIES' signs (arXiv:2306.01708). PEFT's."""
    _check_density(density)
    with _drawing(deltas[0].A.device, seed), _no_warning_at_one():
        return merge_utils.dare_ties(*_full(deltas, weights), density)


def breadcrumbs(
    deltas: Sequence[Delta], weights: Sequence[float], *, density: float, gamma: float = 0.01
) -> Tensor:
    """Model Breadcrumbs (arXiv:2312.06795): drop both tails of each ΔW's magnitudes, and add.

    gamma: the share of the largest that is dropped; of the smallest, as many as leave the share
    `density`.
    """
    _check_density(density)
    check_number("gamma", gamma, 0.0, 1.0, open_high=True)
    if density + gamma > 1 + 1e-9:
        raise ValueError(
            f"density={density} and gamma={gamma} keep and drop more than there is: expected density + gamma ≤ 1."
        )
    tensors, factors = _full(deltas, weights)
    return merge_utils.task_arithmetic(
        [_without_tails(t, density, gamma) for t in tensors], factors
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
    """`options`, once it is sure that there is such a recipe and that they are its options.

    Raises:
        ValueError: no such recipe, or an option that it lacks or needs.
    """
    if recipe not in RECIPES:
        raise ValueError(
            f"recipe={recipe!r} is unknown. The recipes are: {', '.join(sorted(RECIPES))}."
        )
    parameters = list(inspect.signature(RECIPES[recipe]).parameters.values())[2:]
    known = [p.name for p in parameters]
    needed = [p.name for p in parameters if p.default is p.empty]
    unknown, missing = sorted(set(options) - set(known)), [n for n in needed if n not in options]
    if unknown or missing:
        what = f"has no option {unknown}" if unknown else f"needs {', '.join(missing)}"
        raise ValueError(
            f"The recipe {recipe!r} {what}. Its options are: {', '.join(known) or 'none'}."
        )
    return dict(options)


def merged_deltas(
    model: Any, weights: Mapping[str, float], recipe: str, options: Mapping[str, Any]
) -> Iterator[tuple[str, Delta | Tensor]]:
    """Each adapted linear's name and merged ΔW, one after another; linears that none of the experts
    has are left out.

    Each linear draws with a seed of its own, which follows from `seed`.
    """
    config, seeds = model.moelora_config, torch.Generator()
    if "seed" in options:
        check_integer("seed", options["seed"], 0)
        seeds.manual_seed(options["seed"])
    for name, (site, i) in adapted(model).items():
        found = [(delta_of(site, i, config.expert_index(e)), w) for e, w in weights.items()]
        own = dict(options)
        if "seed" in own:
            own["seed"] = int(torch.randint(2**31, (), generator=seeds))
        there = [(d, w) for d, w in found if d.rank]
        if there:
            with torch.no_grad():
                merged = RECIPES[recipe]([d for d, _ in there], [w for _, w in there], **own)
            yield name, merged


def check_weights(model: Any, weights: Mapping[str, float]) -> dict[str, float]:
    """`weights` as floats, once it is sure that they weigh experts of `model`.

    Raises:
        ValueError, TypeError: no mapping, none, an unknown name, or a weight that is no finite
        number.
    """
    if not isinstance(weights, Mapping):
        raise TypeError(
            f"weights is a {type(weights).__name__}; expected a weight for each expert's name."
        )
    names = model.moelora_config.expert_names
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


def _nothing(like: Delta) -> Delta:
    """The zero delta of rank 1: what weights of 0 leave."""
    return Delta(torch.zeros_like(like.A[:1]), torch.zeros_like(like.B[:, :1]))


def _full(deltas: Sequence[Delta], weights: Sequence[float]) -> tuple[list[Tensor], Tensor]:
    tensors = [delta.full() for delta in deltas]
    return tensors, torch.tensor(weights, dtype=tensors[0].dtype, device=tensors[0].device)


def _check_density(density: float) -> None:
    check_number("density", density, 0.0, 1.0, open_low=True)


@contextmanager
def _drawing(device: torch.device, seed: int) -> Iterator[None]:
    """Inside, PEFT draws with this seed; the process' own random state is untouched."""
    check_integer("seed", seed, 0)
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


@contextmanager
def _no_warning_at_one() -> Iterator[None]:
    """PEFT warns that density 1 prunes nothing, which is what it says."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The density")
        yield
