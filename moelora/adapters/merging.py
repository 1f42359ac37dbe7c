"""Merging experts: recipes over what they add to a linear, ΔW = s·Bᵀ·A.

A recipe is a function `(factors, weights, **options)` in `RECIPES`. It gets `LoraFactors`, A
`[r, d_in]` and B `[r, d_out]`, of what each expert adds to one linear, and answers with such
factors where the result has a low rank, else with the whole ΔW `[d_out, d_in]`.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from peft.utils import merge_utils
from torch import Tensor

from ..core.experts import LoraFactors
from ..core.model import MixtureModel
from ..placement import check_lora
from ..validation import check_integer, check_number

Recipe = Callable[..., LoraFactors | Tensor]
Experts = Sequence[LoraFactors]
Weights = Sequence[float]


def concatenation(factors: Experts, weights: Weights) -> LoraFactors:
    """Σ w·s·Bᵀ·A exactly, as one LoRA of scaling 1: rows of A one expert after another, rows of B
    times w·s; of experts that share A, that A and the sum of these.
    """
    used = [(f, w) for f, w in zip(factors, weights) if w != 0]
    if not used:
        # Weights of 0 leave the zero delta, of rank 1.
        return LoraFactors(
            torch.zeros_like(factors[0].A[:1]), torch.zeros_like(factors[0].B[:1]), 1.0
        )
    weighted = [wide(f.B) * (w * f.scaling) for f, w in used]
    first = used[0][0].A
    if all(torch.equal(f.A, first) for f, _ in used[1:]):
        return LoraFactors(wide(first), torch.stack(weighted).sum(0), 1.0)
    return LoraFactors(torch.cat([wide(f.A) for f, _ in used]), torch.cat(weighted), 1.0)


def svd(factors: Experts, weights: Weights, *, rank: int) -> LoraFactors:
    """The best approximation of Σ w·s·Bᵀ·A that has this rank, in Frobenius norm."""
    return compress(concatenation(factors, weights), rank)


def ties(factors: Experts, weights: Weights, *, density: float) -> Tensor:
    """TIES (arXiv:2306.01708): keep each ΔW's `density` largest values, elect signs, average what
    agrees.

    Signs are elected by the sums of the trimmed deltas without weights, and then w_e·ΔW_e is
    averaged over the experts that agree.
    """
    return _by_peft(merge_utils.ties, factors, weights, density)


def dare_linear(factors: Experts, weights: Weights, *, density: float, seed: int) -> Tensor:
    """DARE (arXiv:2311.03099): keep each value with probability `density`, divided by it, and
    add.
    """
    return _by_peft(merge_utils.dare_linear, factors, weights, density, seed)


def dare_ties(factors: Experts, weights: Weights, *, density: float, seed: int) -> Tensor:
    """DARE's random values (arXiv:2311.03099), merged by TIES' signs (arXiv:2306.01708)."""
    return _by_peft(merge_utils.dare_ties, factors, weights, density, seed)


def breadcrumbs(
    factors: Experts, weights: Weights, *, density: float, gamma: float = 0.01
) -> Tensor:
    """Model Breadcrumbs (arXiv:2312.06795): drop both tails of each ΔW's magnitudes, and add.

    gamma: the share of the largest that is dropped; of the smallest, as many as leave the share
    `density`.
    """
    check_number("density", density, 0.0, 1.0, open_low=True)
    check_number("gamma", gamma, 0.0, 1.0, open_high=True)
    if density + gamma > 1 + 1e-9:
        raise ValueError(
            f"density={density} and gamma={gamma}: expected density + gamma of at most 1."
        )
    deltas = [_without_tails(product(own), density, gamma) for own in factors]
    return merge_utils.task_arithmetic(deltas, deltas[0].new_tensor(weights))


RECIPES: dict[str, Recipe] = {
    "linear": concatenation,
    "concatenation": concatenation,
    "svd": svd,
    "ties": ties,
    "dare_linear": dare_linear,
    "dare_ties": dare_ties,
    "breadcrumbs": breadcrumbs,
}


def check_merge(
    model: MixtureModel, weights: Mapping[str, float], recipe: str, options: Mapping[str, Any]
) -> dict[str, float]:
    """`weights` as floats; TypeError or ValueError unless they weigh experts of `model`, and this
    recipe with these options can merge them.
    """
    if not isinstance(weights, Mapping):
        raise TypeError(
            f"weights is a {type(weights).__name__}; expected a weight for each expert's name."
        )
    check_lora(model.moelora_config, "Merging")
    names = model.moelora_config.expert_names or []
    if not weights:
        raise ValueError(f"weights is empty: give at least one of the experts: {', '.join(names)}.")
    for name, weight in weights.items():
        model.moelora_config.expert_index(name)
        check_number(f"weights[{name!r}]", weight, -float("inf"), float("inf"))
    if recipe not in RECIPES:
        raise ValueError(
            f"recipe={recipe!r} is unknown. The recipes are: {', '.join(sorted(RECIPES))}."
        )
    _, _, *parameters = inspect.signature(RECIPES[recipe]).parameters.values()
    known = [p.name for p in parameters]
    unknown = sorted(set(options) - set(known))
    needed = [p.name for p in parameters if p.default is p.empty and options.get(p.name) is None]
    if unknown or needed:
        what = f"has no option {unknown}" if unknown else f"needs {', '.join(needed)}"
        raise ValueError(
            f"The recipe {recipe!r} {what}. Its options are: {', '.join(known) or 'none'}."
        )
    return {name: float(weight) for name, weight in weights.items()}


def merged_deltas(
    model: MixtureModel, weights: Mapping[str, float], recipe: str, options: Mapping[str, Any]
) -> Iterator[tuple[str, LoraFactors | Tensor]]:
    """The name and merged ΔW of each adapted linear that one of the experts has, one after another.

    Where the recipe draws, each linear has a seed of its own, which follows from `seed`.
    """
    experts = [model.moelora.expert(model.moelora_config.expert_index(name)) for name in weights]
    generator = seeded(options.get("seed"))
    for linear in experts[0]:
        own = dict(options)
        if generator is not None:
            own["seed"] = int(torch.randint(2**31, (), generator=generator))
        there = [(e[linear], w) for e, w in zip(experts, weights.values()) if len(e[linear].A)]
        if there:
            with torch.no_grad():
                merged = RECIPES[recipe]([f for f, _ in there], [w for _, w in there], **own)
            yield linear, merged


def expert_deltas(model: MixtureModel, expert: str) -> dict[str, LoraFactors]:
    """One expert's factors by the linear's full name, where its rank is not 0; ValueError where
    they are no LoRA's.
    """
    check_lora(model.moelora_config, "Writing an expert for PEFT")
    factors = model.moelora.expert(model.moelora_config.expert_index(expert))
    return {name: own for name, own in factors.items() if len(own.A)}


def product(factors: LoraFactors) -> Tensor:
    """ΔW = s·Bᵀ·A `[d_out, d_in]` in the factors' dtype."""
    return factors.scaling * (factors.B.T @ factors.A)


@torch.no_grad()
def compress(delta: LoraFactors | Tensor, rank: int) -> LoraFactors:
    """The best approximation of ΔW with at most this rank, in Frobenius norm; its factors have the
    same norm.

    Of `LoraFactors` only the small core of the factors' QR decompositions is decomposed. Those of
    no higher rank come back as they are.
    """
    if isinstance(delta, Tensor):
        U, S, Vh = torch.linalg.svd(delta, full_matrices=False)
    elif len(delta.A) <= rank:
        return delta
    else:
        U, S, Vh = singular_directions(delta)
    roots = S[:rank].sqrt()[:, None]
    return LoraFactors(roots * Vh[:rank], roots * U[:, :rank].T, 1.0)


def singular_directions(delta: LoraFactors) -> tuple[Tensor, Tensor, Tensor]:
    """U `[d_out, r]`, S and Vᵀ `[r, d_in]` with ΔW = U S Vᵀ, r being the rank of the factors."""
    QB, core, QA = _core(delta)
    U, S, Vh = torch.linalg.svd(core, full_matrices=False)
    return QB @ U, S, Vh @ QA.T


@torch.no_grad()
def distance(delta: LoraFactors | Tensor, other: LoraFactors) -> tuple[float, float]:
    """‖ΔW - ΔW'‖ and ‖ΔW‖ in Frobenius norm, ΔW' being that of `other`."""
    if isinstance(delta, Tensor):
        return _norm(delta - product(other).to(delta.dtype)), _norm(delta)
    return _norm(concatenation([delta, other], [1.0, -1.0])), _norm(delta)


def _core(delta: LoraFactors) -> tuple[Tensor, Tensor, Tensor]:
    """Q, S and P with ΔW = Q·S·Pᵀ, where Q and P keep norms and S is no larger than the rank."""
    QB, RB = torch.linalg.qr(wide(delta.B).T * delta.scaling)
    QA, RA = torch.linalg.qr(wide(delta.A).T)
    return QB, RB @ RA.T, QA


def _norm(delta: LoraFactors | Tensor) -> float:
    return float(torch.linalg.matrix_norm(delta if isinstance(delta, Tensor) else _core(delta)[1]))


def wide(tensor: Tensor) -> Tensor:
    """In float64, so that one cast at the end rounds once; MPS has none."""
    return tensor if tensor.device.type == "mps" else tensor.double()


def seeded(seed: int | None) -> torch.Generator | None:
    """A generator on the CPU, which draws the same on every machine; None for no seed."""
    if seed is None:
        return None
    check_integer("seed", seed, 0, 2**64 - 1)
    return torch.Generator().manual_seed(seed)


def _by_peft(
    merge: Callable[..., Tensor], factors: Experts, weights: Weights, density: float, seed: int = 0
) -> Tensor:
    """PEFT's implementation of a recipe; what it draws follows from `seed`, and the process' own
    random state is untouched.
    """
    check_number("density", density, 0.0, 1.0, open_low=True)
    check_integer("seed", seed, 0)
    deltas = [product(own) for own in factors]
    device = deltas[0].device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        with warnings.catch_warnings():
            # PEFT warns that density 1 prunes nothing, which is what it says.
            warnings.filterwarnings("ignore", message="The density")
            return merge(deltas, deltas[0].new_tensor(weights), density)


def _without_tails(tensor: Tensor, density: float, gamma: float) -> Tensor:
    """`tensor` with zeros where its magnitude is among the largest or the smallest."""
    largest = int(gamma * tensor.numel())
    kept = min(int(density * tensor.numel()), tensor.numel() - largest)
    where = tensor.abs().flatten().topk(largest + kept).indices[largest:]
    sparse = torch.zeros_like(tensor).flatten()
    sparse[where] = tensor.flatten()[where]
    return sparse.view_as(tensor)
