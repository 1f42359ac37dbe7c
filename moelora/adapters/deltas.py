"""What an expert adds to a linear, as a product of two small factors: reading, approximating and
comparing it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Delta:
    """What an expert adds to one linear: ΔW = s·B·A, with A `[r, d_in]` and B `[d_out, r]` as PEFT
    has them.
    """

    A: Tensor
    B: Tensor
    scaling: float = 1.0

    @property
    def rank(self) -> int:
        """r."""
        return self.A.shape[0]

    def full(self) -> Tensor:
        """ΔW `[d_out, d_in]` in the factors' dtype."""
        return self.scaling * (self.B @ self.A)


def adapted(model: Any) -> dict[str, tuple[Any, int]]:
    """Each adapted linear's site and its number there, by the linear's name."""
    return {
        name: (site, i)
        for site in model.moelora.sites.values()
        for i, name in enumerate(site.names)
    }


def delta_of(site: Any, index: int, expert: int) -> Delta:
    """The delta of expert number `expert` in linear number `index` of a site; views of the
    mixture's own rows.
    """
    linear = site.linears[index]
    A = site.lora_A.stacked().detach()[site.lora_A.expert_rows(expert)[index]]
    B = linear.lora_B.stacked().detach()[linear.lora_B.expert_rows(expert)[0]]
    return Delta(A, B.T, linear.scaling[expert])


def expert_deltas(model: Any, expert: str) -> dict[str, Delta]:
    """The deltas of one expert by the linear's name, where it has any."""
    e = model.moelora_config.expert_index(expert)
    found = {name: delta_of(site, i, e) for name, (site, i) in adapted(model).items()}
    return {name: delta for name, delta in found.items() if delta.rank}


@torch.no_grad()
def compress(product: Delta | Tensor, rank: int) -> Delta:
    """The best approximation of ΔW that has at most this rank, in Frobenius norm, its factors of
    equal size.

    Of a `Delta` only the small core R_B·R_Aᵀ of the factors' QR decompositions is decomposed, so
    nothing of size [d_out, d_in] is made. A `Delta` of no higher rank comes back as it is.
    """
    if isinstance(product, Tensor):
        U, S, Vh = torch.linalg.svd(product, full_matrices=False)
        return _from_svd(U, S, Vh, rank)
    if product.rank <= rank:
        return product
    QB, RB = torch.linalg.qr(wide(product.B) * product.scaling)
    QA, RA = torch.linalg.qr(wide(product.A).T)
    U, S, Vh = torch.linalg.svd(RB @ RA.T, full_matrices=False)
    return _from_svd(QB @ U, S, Vh @ QA.T, rank)


@torch.no_grad()
def distance(product: Delta | Tensor, other: Delta) -> tuple[float, float]:
    """‖ΔW - ΔW'‖ and ‖ΔW‖ in Frobenius norm, of `other` as it is; nothing of size [d_out, d_in] for
    a `Delta`.
    """
    if isinstance(product, Tensor):
        difference = product - other.full().to(product.device, product.dtype)
        return float(torch.linalg.matrix_norm(difference)), float(torch.linalg.matrix_norm(product))
    device = product.A.device
    A, B = wide(other.A.to(device)), wide(other.B.to(device)) * -other.scaling
    both = Delta(
        torch.cat([wide(product.A), A]), torch.cat([wide(product.B) * product.scaling, B], dim=1)
    )
    return _norm(both), _norm(product)


def _norm(delta: Delta) -> float:
    """‖s·B·A‖ through the factors' QR decompositions."""
    R = [torch.linalg.qr(wide(t), mode="r").R for t in (delta.B, delta.A.T)]
    return abs(delta.scaling) * float(torch.linalg.matrix_norm(R[0] @ R[1].T))


def _from_svd(U: Tensor, S: Tensor, Vh: Tensor, rank: int) -> Delta:
    roots = S[:rank].sqrt()
    return Delta(roots[:, None] * Vh[:rank], U[:, :rank] * roots)


def wide(tensor: Tensor) -> Tensor:
    """In float64, so that one cast at the end rounds once; MPS has none."""
    return tensor if tensor.device.type == "mps" else tensor.double()
