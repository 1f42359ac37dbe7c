"""What an expert adds to a linear, ΔW = s·Bᵀ·A: reading, approximating and comparing it.

`LoraFactors` hold A `[r, d_in]` and B `[r, d_out]`; nothing of size `[d_out, d_in]` is made from
them but by `product`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..core.experts import LoraFactors
from ..core.model import MixtureModel


def expert_deltas(model: MixtureModel, expert: str) -> dict[str, LoraFactors]:
    """One expert's factors by the linear's full name, where its rank is not 0.

    Args:
        model: a model with a mixture inside.
        expert: the expert's name.

    Raises:
        ValueError: there is no such expert.
    """
    factors = model.moelora.expert(model.moelora_config.expert_index(expert))
    return {name: own for name, own in factors.items() if len(own.A)}


def product(factors: LoraFactors) -> Tensor:
    """ΔW = s·Bᵀ·A `[d_out, d_in]` in the factors' dtype."""
    return factors.scaling * (factors.B.T @ factors.A)


@torch.no_grad()
def compress(delta: LoraFactors | Tensor, rank: int) -> LoraFactors:
    """The best approximation of ΔW with at most this rank, in Frobenius norm; its factors have the
    same norm.

    Of `LoraFactors` only the small core of the factors' QR decompositions is decomposed, so that
    nothing of size [d_out, d_in] is made. Those of no higher rank come back as they are.

    Args:
        delta: the factors, or the whole ΔW `[d_out, d_in]`.
        rank: the largest rank of the answer.
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
        difference = delta - product(other).to(delta.device, delta.dtype)
        return float(torch.linalg.matrix_norm(difference)), float(torch.linalg.matrix_norm(delta))
    device = delta.A.device
    A = torch.cat([wide(delta.A), wide(other.A.to(device))])
    B = torch.cat([wide(delta.B) * delta.scaling, wide(other.B.to(device)) * -other.scaling])
    return _norm(LoraFactors(A, B, 1.0)), _norm(delta)


def _norm(factors: LoraFactors) -> float:
    """‖s·Bᵀ·A‖ through the factors' QR decompositions."""
    RB, RA = (torch.linalg.qr(wide(t).T, mode="r").R for t in (factors.B, factors.A))
    return abs(factors.scaling) * float(torch.linalg.matrix_norm(RB @ RA.T))


def wide(tensor: Tensor) -> Tensor:
    """In float64, so that one cast at the end rounds once; MPS has none."""
    return tensor if tensor.device.type == "mps" else tensor.double()
