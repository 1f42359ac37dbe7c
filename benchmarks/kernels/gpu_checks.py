"""What must be true on a GPU before a time is worth taking: right, repeatable, compilable,
capturable.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, product
from typing import Any

import torch
from moelora_kernels import (
    PATHS,
    TopK,
    build_decode_plan,
    build_plan,
    expand,
    lora_mixture,
    reference,
    shrink,
)
from moelora_kernels.triton import FUSED_RANKS_FP32, fused_mixture
from torch import Tensor

from benchmarks.kernels.timing import captured

Row = dict[str, Any]
Outcome = dict[str, Tensor]
NAMES = ("x", "lora_A", "lora_B", "weights", "out")
# Largest error over the largest value of the float64 reference: some roundings of the dtype.
TOLERANCES = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 3e-2}


@dataclass(frozen=True)
class Shape:
    """rows of tokens_per_row tokens, K slots, experts of these ranks."""

    rows: int
    d_in: int
    d_out: int
    ranks: tuple[int, ...]
    top_k: int = 2
    tokens_per_row: int = 1

    @property
    def offsets(self) -> tuple[int, ...]:
        """Where each expert's rows begin."""
        return (0, *accumulate(self.ranks))

    @property
    def scaling(self) -> tuple[float, ...]:
        """s_e, all different."""
        return tuple(0.5 + 0.25 * expert for expert in range(len(self.ranks)))


# Each with what is odd about it.
SHAPES = {
    "training": Shape(512, 1024, 768, (16,) * 8),
    "mixed ranks": Shape(200, 512, 520, (1, 4, 8, 12, 48, 96, 256)),
    "many experts": Shape(256, 256, 512, (8,) * 256),
    "one token": Shape(1, 1024, 1024, (16,) * 8),
    "no token": Shape(0, 256, 256, (16,) * 4),
    "sequences": Shape(4, 512, 512, (16,) * 8, tokens_per_row=100),
    "widths that nothing divides": Shape(33, 257, 131, (3, 5)),
}
SMALL = {"small": Shape(3, 24, 40, (4, 0, 3)), "rows": Shape(2, 16, 24, (2, 5), tokens_per_row=3)}


def inputs_of(shape: Shape, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Outcome]:
    """expert_ids with some −1, and x, lora_A, lora_B, weights (fp32) and out."""
    torch.manual_seed(0)
    tokens = shape.rows * shape.tokens_per_row
    rank = shape.offsets[-1]
    sizes = {"x": (tokens, shape.d_in), "lora_A": (rank, shape.d_in), "lora_B": (rank, shape.d_out)}
    sizes |= {"weights": (shape.rows, shape.top_k), "out": (tokens, shape.d_out)}
    values = {name: torch.randn(size, device=device) for name, size in sizes.items()}
    values = {name: t if name == "weights" else t.to(dtype) for name, t in values.items()}
    return torch.randint(-1, len(shape.ranks), (shape.rows, shape.top_k), device=device), values


def outcome(function: Callable[..., Tensor], values: Outcome) -> Outcome:
    """y and the gradient of every input, for a fixed dy."""
    leaves = {name: t.detach().requires_grad_() for name, t in values.items()}
    y = function(**leaves)
    dy = (
        torch.cos(torch.arange(y.numel(), device=y.device, dtype=torch.float32))
        .view(y.shape)
        .to(y.dtype)
    )
    grads = torch.autograd.grad(y, list(leaves.values()), dy)
    return {"y": y.detach(), **{f"d{name}": grad for name, grad in zip(leaves, grads)}}


def ours(shape: Shape, ids: Tensor, path: str, tiles: str = "") -> Callable[..., Tensor]:
    """The mixture on the triton backend, with a table of tiles; "fused" is the single launch."""
    fixed = (shape.offsets, shape.scaling)

    def function(x: Tensor, lora_A: Tensor, lora_B: Tensor, weights: Tensor, out: Tensor) -> Tensor:
        if path != "fused":
            return lora_mixture(
                x,
                lora_A,
                lora_B,
                ids,
                weights,
                *fixed,
                out,
                tokens_per_row=shape.tokens_per_row,
                path=path,
                backend="triton",
                tiles=tiles,
            )
        plan = build_plan(
            ids,
            weights,
            len(shape.ranks),
            total_rank=shape.offsets[-1],
            tokens_per_row=shape.tokens_per_row,
            path="dense",
            backend="triton",
            dtype=x.dtype,
            tiles=tiles,
        )
        return fused_mixture(x, lora_A, lora_B, *fixed, plan, out)

    return function


def wanted(shape: Shape, ids: Tensor, values: Outcome) -> Outcome:
    """What the specification gives in float64."""

    def function(x: Tensor, lora_A: Tensor, lora_B: Tensor, weights: Tensor, out: Tensor) -> Tensor:
        fixed = (ids, weights, shape.offsets, shape.scaling, out)
        return reference.lora_mixture(
            x, lora_A, lora_B, *fixed, tokens_per_row=shape.tokens_per_row
        )

    return outcome(function, {name: t.double() for name, t in values.items()})


def paths_of(shape: Shape) -> tuple[str, ...]:
    """The paths that take a shape in every dtype."""
    return (*PATHS, "fused") if shape.offsets[-1] <= FUSED_RANKS_FP32 else PATHS


def correctness(
    shapes: dict[str, Shape], device: torch.device, dtypes: list[torch.dtype]
) -> Iterator[Row]:
    """The largest error of every shape, path and dtype, of y and each gradient; and of decoding."""
    for (name, shape), dtype in product(shapes.items(), dtypes):
        ids, values = inputs_of(shape, device, dtype)
        exact = wanted(shape, ids, values)
        for path in paths_of(shape):
            row = {"check": "values and gradients", "case": name, "path": path, "dtype": str(dtype)}
            run = partial(outcome, ours(shape, ids, path), values)
            yield _judged(row, partial(_compared, run, exact, dtype))
    for dtype, tokens in product(dtypes, (1, 5, 64)):
        row = {
            "check": "decoding",
            "case": f"{tokens} tokens",
            "path": "decode",
            "dtype": str(dtype),
        }
        yield _judged(row, partial(_decoding, device, dtype, tokens))


def compiled(device: torch.device, dtype: torch.dtype) -> Iterator[Row]:
    """torch.compile without graph breaks gives the same bits, gradients included."""
    yield from _again(
        "torch.compile",
        device,
        dtype,
        lambda run, values: outcome(torch.compile(run, fullgraph=True), values),
    )


def graphs(device: torch.device, dtype: torch.dtype) -> Iterator[Row]:
    """A CUDA graph of the forward and backward pass gives the same bits."""
    yield from _again(
        "CUDA graph", device, dtype, lambda run, values: captured(partial(outcome, run, values))()
    )


def _again(
    check: str,
    device: torch.device,
    dtype: torch.dtype,
    how: Callable[[Callable[..., Tensor], Outcome], Any],
) -> Iterator[Row]:
    """Every path in another way: the same bits."""
    shape = SHAPES["training"]
    ids, values = inputs_of(shape, device, dtype)
    for path in PATHS:

        def same(path: str = path) -> Row:
            function = ours(shape, ids, path)
            got = how(function, values)
            torch.cuda.synchronize()
            expected = outcome(function, values)
            return {"ok": all(torch.equal(got[key], value) for key, value in expected.items())}

        yield _judged({"check": check, "case": "training", "path": path, "dtype": str(dtype)}, same)


def _judged(row: Row, check: Callable[[], Row]) -> Row:
    """The row with what the check says; one that dies is wrong, and the next are still made."""
    try:
        return {**row, **check()}
    except Exception as error:
        return {**row, "error": f"{type(error).__name__}: {str(error)[:300]}", "ok": False}


def _compared(run: Callable[[], Outcome], exact: Outcome, dtype: torch.dtype) -> Row:
    got = run()
    again = run()
    errors = {key: _error(got[key], value) for key, value in exact.items()}
    worst = max(errors, key=lambda key: errors[key])
    same = all(torch.equal(got[key], again[key]) for key in got)
    ok = same and errors[worst] <= TOLERANCES[dtype]
    return {"worst": worst, "error": errors[worst], "same bits again": same, "ok": ok}


def _decoding(device: torch.device, dtype: torch.dtype, tokens: int) -> Row:
    """The decode path: the experts that it chooses, and its error."""
    shape = Shape(tokens, 512, 264, (16, 4, 8, 12))
    _, values = inputs_of(shape, device, dtype)
    router = torch.randn(4, 512, device=device) / 22
    plan = build_decode_plan(TopK(router), tokens, 2)
    (h,) = shrink(values["x"], values["lora_A"], (shape.offsets,), plan)
    y = expand(h, values["lora_B"], shape.offsets, shape.scaling, plan, values["out"])
    doubles = {name: t.double() for name, t in values.items()}
    ids, weights = reference.top_k(doubles["x"], router.double(), 2)
    factors = (doubles["lora_A"], doubles["lora_B"])
    fixed = (ids, weights, shape.offsets, shape.scaling, doubles["out"])
    error = _error(y, reference.lora_mixture(doubles["x"], *factors, *fixed))
    same = torch.equal(ids, plan.expert_ids)
    return {"error": error, "ok": same and error <= TOLERANCES[dtype]}


def _error(got: Tensor, exact: Tensor) -> float:
    if not exact.numel():
        return 0.0
    return float((got.double() - exact).abs().max() / exact.abs().max().clamp(1e-3))
