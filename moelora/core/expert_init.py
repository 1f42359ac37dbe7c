"""How A begins, B being 0: at random, or as slices of an orthogonal matrix or of a spectrum; all
experts of a new mixture, or one that joins others.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from .experts import is_sharded
from .linear import Site

# The root mean square of a row that PEFT's initialisation draws, uniform in ±1/√d_in.
ROW_NORM = 1 / math.sqrt(3)
ASKED_AT = 1024.0
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@torch.no_grad()
def begin_experts(model: Any) -> None:
    """Set the A of every expert as `expert_init` says; every B stays 0, so that the new mixture is
    the base, bit for bit.

    "kaiming": what the sites were made with, uniform in ±1/√d_in as PEFT's.
    "orthogonal": in each linear, all experts' rows are orthonormal, up to a factor: the slices of
    one random orthogonal matrix. Fine experts that begin at random overlap; these do not.
    "svd": in each linear, expert e has r_e right singular vectors of the frozen weight W, the e-th
    of E segments that are spread over the whole spectrum, as in GOAT (arXiv:2502.16894). Different
    from GOAT: B is 0 and W stays as it is, where GOAT puts the singular values into A and B and
    takes their sum out of W. Which directions of the input an expert reads first is the same.
    Rows have the length that those of "kaiming" have on average, 1/√3. Experts that share A have
    one slice.

    Args:
        model: the one with the mixture inside; where it has no values yet, nothing happens.

    Raises:
        ValueError: more rows in a linear than inputs, or a weight that cannot be read.
    """
    mixture = model.moelora
    how = mixture.config.expert_init
    if how == "kaiming" or not mixture.has_values:
        return
    for site in mixture.sites.values():
        like = site.lora_A.block(0, 0)
        rows = []
        for number, (name, ranks) in enumerate(zip(site.names, _ranks(site), strict=True)):
            _check_fits(how, name, sum(ranks), site.in_features)
            if how == "svd":
                size = (site.lora_B[number].width, site.in_features)
                own = _segments(_weight(model, name, size, like.device), ranks)
            else:
                # Drawn on the CPU: one seed gives the same experts on every device.
                own = torch.empty(sum(ranks), site.in_features, dtype=like.dtype, device="cpu")
                own = nn.init.orthogonal_(own) if len(own) else own
            rows.append(own.to(like))
        site.lora_A.fill(torch.cat(rows) * ROW_NORM)


@torch.no_grad()
def begin_one(
    model: Any,
    linear: str,
    others: Sequence[Tensor],
    rank: int,
    d_out: int,
    generator: torch.Generator | None,
) -> Tensor:
    """The A `[r, d_in]` of one expert that joins others in a linear, as `expert_init` says, in
    float64 on the CPU; not for "kaiming", which asks nothing of the others.

    "orthogonal": random rows, orthonormal up to their length, and orthogonal to what the others'
    rows are now. "svd": the right singular vectors of the frozen weight, from the largest singular
    value on, that the others do not read: less than half of each lies in what their rows span.

    Args:
        model: the one with the mixture inside.
        linear: its full name.
        others: the A `[r_e, d_in]` of each expert that stays.
        rank: r.
        d_out: of the linear.
        generator: of the random rows; None for torch's own.

    Raises:
        ValueError: more rows than inputs, or a weight that cannot be read.
    """
    how = model.moelora_config.expert_init
    rows = torch.cat(list(others)).cpu().double()
    d_in = rows.shape[1]
    if len(rows) + rank > d_in:
        raise ValueError(
            f"expert_init={how!r} gives each row of A a direction of its own, and in {linear}, "
            f"which has d_in={d_in}, the other experts have {len(rows)} rows, so there is no room "
            f"for {rank} more: pass a smaller r, or set model.moelora_config.expert_init = "
            "'kaiming' before."
        )
    span = _span(rows)
    if how == "svd":
        weight = _weight(model, linear, (d_out, d_in), others[0].device)
        vectors = right_singular_vectors(weight, whole=len(rows) + rank > min(weight.shape))
        vectors = vectors.cpu().double()
        read = (vectors @ span.T).square().sum(1)
        # Training turns the others' rows: theirs are the vectors that lie in them by half or more.
        read = read.masked_fill(read < 0.5, 0.0)
        return vectors[read.argsort(stable=True)[:rank]] * ROW_NORM
    # On the CPU: one seed gives the same expert on every device.
    drawn = torch.randn(rank, d_in, dtype=torch.float64, device="cpu", generator=generator)
    return torch.linalg.qr((drawn - drawn @ span.T @ span).T).Q.T * ROW_NORM


def _span(rows: Tensor) -> Tensor:
    """Orthonormal rows that span what `rows` `[R, d]` span: at most R."""
    sizes, vectors = torch.linalg.eigh(rows @ rows.T)
    # Copies of an expert span nothing new.
    there = sizes > 1e-10 * sizes.amax(0, keepdim=True) if len(sizes) else sizes > 0
    return (vectors[:, there] / sizes[there].sqrt()).T @ rows


def _ranks(site: Site) -> list[tuple[int, ...]]:
    """For each linear the ranks that its blocks of A have."""
    blocks = site.lora_A.blocks
    each = len(blocks) // len(site.names)
    return [blocks[i : i + each] for i in range(0, len(blocks), each)]


def _check_fits(how: str, name: str, rows: int, d_in: int) -> None:
    if rows > d_in:
        raise ValueError(
            f"expert_init={how!r} gives each row of A a direction of its own, and the experts have "
            f"{rows} rows together in {name}, which has d_in={d_in}: lower r or num_experts, or "
            "use expert_init='kaiming'."
        )


def _segments(weight: Tensor, ranks: Sequence[int]) -> Tensor:
    """Right singular vectors of W `[d_out, d_in]`: for each expert its segment's first r_e,
    `[Σ r_e, d_in]`.

    Segments are as far apart as the number of singular values allows; where there are more rows
    than these, the directions that W does not read follow.
    """
    rows = sum(ranks)
    vectors = right_singular_vectors(weight, whole=rows > min(weight.shape))
    gap = len(vectors) - rows
    chosen = []
    for expert, (rank, first) in enumerate(zip(ranks, accumulate(ranks, initial=0))):
        start = first + expert * gap // len(ranks)
        chosen.append(vectors[start : start + rank])
    return torch.cat(chosen)


def right_singular_vectors(weight: Tensor, whole: bool = False) -> Tensor:
    """Vᵀ of W = U S Vᵀ, the largest singular value first, `[min(d_out, d_in), d_in]`.

    They are the eigenvectors of WᵀW, several times faster than a decomposition of W, and always
    orthonormal. In fp32 those whose singular values are below a thousandth of the largest mix with
    their neighbours. The largest entry of each is positive, on every device.

    Args:
        weight: `[d_out, d_in]`.
        whole: all d_in directions, also those that W does not read.
    """
    W = weight.to(torch.promote_types(weight.dtype, torch.float32))
    # MPS has no eigenvectors.
    W = W.cpu() if W.device.type == "mps" else W
    if whole or W.shape[1] <= W.shape[0]:
        V = torch.linalg.eigh(W.T @ W).eigenvectors
    else:
        Q, R = torch.linalg.qr(W.T)
        V = Q @ torch.linalg.eigh(R @ R.T).eigenvectors
    V = V.T.flip(0)
    signs = V.gather(1, V.abs().argmax(1, keepdim=True)).sign()
    return V * signs


def _weight(model: Any, name: str, size: tuple[int, int], device: torch.device) -> Tensor:
    """The frozen weight of a linear, `[d_out, d_in]` as `size` says, as floating point."""
    linear = model.get_submodule(name)
    weight = getattr(linear, "weight", torch.empty(0))
    if is_sharded(weight):
        raise ValueError(
            f"expert_init='svd' reads the weight of {name}, of which this process has a part: make "
            "the mixture before the model is sharded, or use expert_init='orthogonal'."
        )
    plain = type(weight) in (Tensor, nn.Parameter) and weight.dtype in FLOATS
    stored = size[::-1] if isinstance(linear, Conv1D) else size
    if plain and not weight.is_meta and tuple(weight.shape) == stored:
        return weight.T if isinstance(linear, Conv1D) else weight
    # Quantised or offloaded: what the linear itself makes of each direction of its input.
    return _asked(linear, name, torch.eye(size[1], device=device, dtype=model.dtype))


def _asked(linear: nn.Module, name: str, directions: Tensor) -> Tensor:
    """W `[d_out, d_in]` from what a linear gives for the directions `[d_in, d_in]` and for 0."""
    # Large, since in 16 bits a bias beside small products would round them off.
    directions = directions * ASKED_AT
    first = directions[:1]
    try:
        # Its forward alone, for the hooks around it add the experts' part.
        at_zero = linear.forward(torch.zeros_like(first))
        outputs = linear.forward(directions) - at_zero
        scaled = linear.forward(-2 * first) - at_zero
        if float((scaled + 2 * outputs[:1]).norm()) > 0.2 * float(scaled.norm()):
            raise ValueError("it is not linear")
    except Exception as error:
        # Of whatever kind: each way of quantising has kernels of its own.
        raise ValueError(
            f"expert_init='svd' needs the weight of {name}, and this {type(linear).__name__} does "
            f"not show it ({error}): use expert_init='orthogonal'."
        ) from error
    return outputs.T.to(torch.promote_types(outputs.dtype, torch.float32)) / ASKED_AT
