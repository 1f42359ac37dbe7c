"""What an expert adds to a linear, ΔW = s·Bᵀ·A: summing, approximating and comparing it.

`LoraFactors` hold A `[r, d_in]` and B `[r, d_out]`; nothing of size `[d_out, d_in]` is made from
them but by `product`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..core.experts import LoraFactors
from ..core.model import MixtureModel


def expert_deltas(model: MixtureModel, expert: str) -> dict[str, LoraFactors]:
    """One expert's factors by the linear's full name, where its rank is not 0."""
    factors = model.moelora.expert(model.moelora_config.expert_index(expert))
    return {name: own for name, own in factors.items() if len(own.A)}


def product(factors: LoraFactors) -> Tensor:
    """ΔW = s·Bᵀ·A `[d_out, d_in]` in the factors' dtype."""
    return factors.scaling * (factors.B.T @ factors.A)


def concatenation(factors: Sequence[LoraFactors], weights: Sequence[float]) -> LoraFactors:
    """Σ w·s·Bᵀ·A exactly, as one LoRA of scaling 1: rows of A one expert after another, rows of B
    times w·s.
    """
    used = [(f, w) for f, w in zip(factors, weights) if w != 0]
    if not used:
        # Weights of 0 leave the zero delta, of rank 1.
        return LoraFactors(
            torch.zeros_like(factors[0].A[:1]), torch.zeros_like(factors[0].B[:1]), 1.0
        )
    A = torch.cat([wide(f.A) for f, _ in used])
    B = torch.cat([wide(f.B) * (w * f.scaling) for f, w in used])
    return LoraFactors(A, B, 1.0)


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
        QB, RB = torch.linalg.qr(wide(delta.B).T * delta.scaling)
        QA, RA = torch.linalg.qr(wide(delta.A).T)
        U, S, Vh = torch.linalg.svd(RB @ RA.T, full_matrices=False)
        U = QB @ U
        Vh = Vh @ QA.T
    roots = S[:rank].sqrt()[:, None]
    return LoraFactors(roots * Vh[:rank], roots * U[:, :rank].T, 1.0)


@torch.no_grad()
def distance(delta: LoraFactors | Tensor, other: LoraFactors) -> tuple[float, float]:
    """‖ΔW - ΔW'‖ and ‖ΔW‖ in Frobenius norm, ΔW' being that of `other`."""
    if isinstance(delta, Tensor):
        return _norm(delta - product(other).to(delta.device, delta.dtype)), _norm(delta)
    device = delta.A.device
    other = LoraFactors(other.A.to(device), other.B.to(device), other.scaling)
    return _norm(concatenation([delta, other], [1.0, -1.0])), _norm(delta)


def _norm(delta: LoraFactors | Tensor) -> float:
    """‖ΔW‖, of factors through their QR decompositions."""
    if isinstance(delta, Tensor):
        return float(torch.linalg.matrix_norm(delta))
    RB, RA = (torch.linalg.qr(wide(t).T, mode="r").R for t in (delta.B, delta.A))
    return abs(delta.scaling) * float(torch.linalg.matrix_norm(RB @ RA.T))


def wide(tensor: Tensor) -> Tensor:
    """In float64, so that one cast at the end rounds once; MPS has none."""
    return tensor if tensor.device.type == "mps" else tensor.double()
