"""Shapes, inputs and tolerances of the kernel tests."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, product
from typing import Any

import torch
from moelora_kernels import BACKENDS, PATHS, Layout, lora_mixture, reference, triton
from torch import Tensor

# Largest error over the largest value of the float64 reference: about 8 roundings of the dtype.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.float16: 4e-3, torch.bfloat16: 3e-2}
# Under Triton's interpreter (a run of its own, see the Makefile) the Triton kernels are tested,
# else the others.
INTERPRETED = triton.interpreted()
BACKENDS_AND_PATHS = list(product([b for b in BACKENDS if (b == "triton") == INTERPRETED], PATHS))
# The kernels have no fp64, and the interpreter multiplies bf16 wrongly (triton #11584).
EXACT = torch.float32 if INTERPRETED else torch.float64
# Of drawn shapes, a result of one or two terms that cancel is off by many roundings of its own
# size: fp64's tolerance has room for 4500 of them, fp32's for 17.
CANCELLING = 1e-4 if INTERPRETED else 0.0
DTYPES = [torch.float32, torch.float16] if INTERPRETED else list(TOLERANCE)
HALVES = [torch.float16] if INTERPRETED else [torch.bfloat16, torch.float16]


@dataclass(frozen=True)
class Case:
    """One shape; ids: "random" (with -1), "none" (all -1), "one" (expert 0), "twice" (the last)."""

    rows: int = 6
    tokens_per_row: int = 1
    ranks: tuple[int, ...] = (4, 4, 4)
    num_slots: int = 2
    d_in: int = 16
    d_out: int = 24
    ids: str = "random"
    with_out: bool = True
    scaling: tuple[float, ...] | None = None

    @property
    def offsets(self) -> tuple[int, ...]:
        return (0, *accumulate(self.ranks))

    @property
    def scales(self) -> tuple[float, ...]:
        return self.scaling or tuple(0.5 + i for i in range(len(self.ranks)))

    @property
    def layout(self) -> Layout:
        return Layout((self.offsets,), self.scales)


# Each odd shape with its reason.
CASES = {
    "plain": Case(),
    "scaled alike: a float and not a tensor": Case(scaling=(2.0, 2.0, 2.0)),
    "mixed ranks pad": Case(ranks=(1, 5, 3)),
    "an expert of rank 0 has no rows": Case(ranks=(4, 0, 2)),
    "all of rank 0: empty factors": Case(ranks=(0, 0)),
    "fewer ranks than experts: not uniform though R // E is 0": Case(ranks=(0, 1, 0)),
    "mean rank whole, ranks not": Case(ranks=(1, 3, 2)),
    "one expert, one slot: PEFT": Case(ranks=(8,), num_slots=1),
    "more experts than slots in all": Case(rows=2, ranks=(2,) * 40),
    "odd widths: no vector fits": Case(d_in=7, d_out=1, ranks=(3, 3)),
    "no token": Case(rows=0),
    "no slot": Case(num_slots=0),
    "no expert chosen": Case(ids="none"),
    "all tokens on one expert": Case(ids="one", num_slots=1),
    "an expert twice in a row": Case(ids="twice", num_slots=3),
    "rows of several tokens": Case(rows=3, tokens_per_row=5),
    "rows of several tokens, mixed ranks": Case(rows=3, tokens_per_row=5, ranks=(2, 0, 3)),
    "rows of no token": Case(rows=2, tokens_per_row=0),
    "no out": Case(with_out=False),
    "no out, mixed ranks, rows": Case(with_out=False, rows=2, tokens_per_row=3, ranks=(1, 2)),
}


def make(case: Case, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, dict[str, Any]]:
    """expert_ids, and the five inputs that take gradients, the weights in fp32 or fp64."""
    torch.manual_seed(seed)
    experts, shape = len(case.ranks), (case.rows, case.num_slots)
    ids = torch.randint(-1, experts, shape)
    if case.ids != "random":
        ids = torch.full(shape, {"none": -1, "one": 0, "twice": experts - 1}[case.ids])
    tokens, rank = case.rows * case.tokens_per_row, case.offsets[-1]
    return ids, {
        "x": torch.randn(tokens, case.d_in).to(dtype),
        "lora_A": torch.randn(rank, case.d_in).to(dtype),
        "lora_B": torch.randn(rank, case.d_out).to(dtype),
        "weights": torch.rand(shape).to(dtype if dtype == torch.float64 else torch.float32),
        "out": torch.randn(tokens, case.d_out).to(dtype) if case.with_out else None,
    }


def run(function: Callable[..., Tensor], inputs: dict[str, Any]) -> dict[str, Tensor]:
    """y and the gradient of every input, for a fixed dy."""
    leaves = {n: t.detach().requires_grad_() for n, t in inputs.items() if t is not None}
    y = function(**{**inputs, **leaves})
    dy = torch.cos(torch.arange(y.numel(), dtype=torch.float64)).view(y.shape).to(y.dtype)
    if not y.requires_grad:  # no slot and no out: y depends on nothing
        y = y + 0 * next(iter(leaves.values())).sum()
    grads = torch.autograd.grad(y, list(leaves.values()), dy, materialize_grads=True)
    return {"y": y.detach(), **{f"d{n}": g for n, g in zip(leaves, grads, strict=True)}}


def mixture(case: Case, ids: Tensor, **options: Any) -> Callable[..., Tensor]:
    """`lora_mixture` as a function of the five inputs."""
    options["tokens_per_row"] = case.tokens_per_row

    def function(x: Tensor, lora_A: Tensor, lora_B: Tensor, weights: Tensor, out: Any) -> Tensor:
        fixed = (case.offsets, case.scales)
        return lora_mixture(x, lora_A, lora_B, ids, weights, *fixed, out, **options)

    return function


def expected(case: Case, ids: Tensor, inputs: dict[str, Any]) -> dict[str, Tensor]:
    """What the specification gives in float64."""

    def function(x: Tensor, lora_A: Tensor, lora_B: Tensor, weights: Tensor, out: Any) -> Tensor:
        return reference.lora_mixture(
            x,
            lora_A,
            lora_B,
            ids,
            weights,
            case.offsets,
            case.scales,
            out,
            tokens_per_row=case.tokens_per_row,
        )

    doubles = {n: None if t is None else t.double() for n, t in inputs.items()}
    return run(function, doubles)


def assert_close(
    actual: dict[str, Tensor],
    reference: dict[str, Tensor],
    dtype: torch.dtype,
    tolerance: float = 0.0,
) -> None:
    """Each tensor within the dtype's tolerance (or a larger one) of the reference, and finite where
    it is.
    """
    assert actual.keys() == reference.keys()
    for name, wanted in reference.items():
        assert actual[name].shape == wanted.shape, name
        if wanted.numel():
            error = (actual[name].double() - wanted).abs().max() / wanted.abs().max().clamp(1e-3)
            assert error <= max(TOLERANCE[dtype], tolerance), f"{name}: error {error:.1e}"


def with_ranks(ranks: Sequence[int], **fields: Any) -> Case:
    """A case of these ranks."""
    return replace(Case(), ranks=tuple(ranks), **fields)
