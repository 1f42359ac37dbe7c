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
from moelora_kernels import PATHS, lora_mixture, reference
from torch import Tensor

from benchmarks.kernels import measures
from benchmarks.kernels.halves import decoded
from benchmarks.kernels.run import Row, Run, Unit

Outcome = dict[str, Tensor]
Same = Callable[[Callable[..., Tensor], Outcome], Any]
NAMES = ("x", "lora_A", "lora_B", "weights", "out")
DECODED = (1, 5, 64)
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
    # Else y of many experts comes near the largest number that fp16 has.
    values["lora_A"] *= shape.d_in**-0.5
    values["lora_B"] *= max(1, max(shape.ranks)) ** -0.5
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
    """The mixture on the triton backend, with a table of tiles."""

    def function(x: Tensor, lora_A: Tensor, lora_B: Tensor, weights: Tensor, out: Tensor) -> Tensor:
        return lora_mixture(
            x,
            lora_A,
            lora_B,
            ids,
            weights,
            shape.offsets,
            shape.scaling,
            out,
            tokens_per_row=shape.tokens_per_row,
            path=path,
            backend="triton",
            tiles=tiles,
        )

    return function


def wanted(shape: Shape, ids: Tensor, values: Outcome) -> Outcome:
    """What the specification gives in float64."""

    def function(x: Tensor, lora_A: Tensor, lora_B: Tensor, weights: Tensor, out: Tensor) -> Tensor:
        fixed = (ids, weights, shape.offsets, shape.scaling, out)
        return reference.lora_mixture(
            x, lora_A, lora_B, *fixed, tokens_per_row=shape.tokens_per_row
        )

    return outcome(function, {name: t.double() for name, t in values.items()})


def smoke(run: Run) -> Iterator[Unit]:
    """Every path once, forward and backward, on one shape."""
    shapes = dict(list(shapes_of(run).items())[:1])
    yield from _units(run, shapes, [run.suite.dtype], DECODED[:1])


def first(run: Run) -> Iterator[Unit]:
    """The dtype that is timed: every shape and path, and every candidate of ours on every case that
    is timed later, whose kernels are then compiled.
    """
    yield from measures.right(run)
    yield from _units(run, shapes_of(run), [run.suite.dtype], DECODED)
    yield from again(run)


def others(run: Run) -> Iterator[Unit]:
    """Every shape and path in the other dtypes."""
    if run.suite.interpreted:
        shapes = {"small": SMALL["small"]}
        yield from _units(run, shapes, [torch.float32], DECODED[:1])
    else:
        yield from _units(run, SHAPES, [torch.float16, torch.float32], DECODED)


def shapes_of(run: Run) -> dict[str, Shape]:
    """The shapes of this run."""
    return SMALL if run.suite.interpreted else SHAPES


def _units(
    run: Run, shapes: dict[str, Shape], dtypes: list[torch.dtype], tokens: tuple[int, ...]
) -> Iterator[Unit]:
    for dtype, (name, shape), path in product(dtypes, shapes.items(), PATHS):
        columns = {"check": "values and gradients", "case": name, "path": path}
        columns["dtype"] = str(dtype)
        check = partial(_compared, run, shape, path, dtype)
        yield f"{name}, {path}, {dtype}", partial(_judged, run, columns, check)
    for dtype, count in product(dtypes, tokens):
        columns = {"check": "decoding", "case": f"{count} tokens", "path": "decode"}
        columns["dtype"] = str(dtype)
        check = partial(_decoding, run.device, dtype, count)
        yield f"decode {count}, {dtype}", partial(_judged, run, columns, check)


def again(run: Run) -> Iterator[Unit]:
    """Every path under torch.compile without graph breaks, and in a CUDA graph of its forward and
    backward pass: the same bits.
    """
    shapes = shapes_of(run)
    name = next(iter(shapes))
    # Without a GPU nothing can be generated for one.
    backend = "inductor" if run.is_gpu else "aot_eager"

    def compiled(function: Callable[..., Tensor], values: Outcome) -> Any:
        torch._dynamo.reset()
        return outcome(torch.compile(function, fullgraph=True, backend=backend), values)

    def replayed(function: Callable[..., Tensor], values: Outcome) -> Any:
        return run.captured(partial(outcome, function, values))()

    ways: dict[str, Same] = {"torch.compile": compiled, "CUDA graph": replayed}
    for (check, way), path in product(ways.items(), PATHS[:1] if run.suite.interpreted else PATHS):
        columns = {"check": check, "case": name, "path": path, "dtype": str(run.suite.dtype)}
        same = partial(_same, run, shapes[name], path, way)
        yield f"{check}, {path}", partial(_judged, run, columns, same)


def _same(run: Run, shape: Shape, path: str, way: Same) -> Row:
    """Whether a path in another way gives the same bits."""
    ids, values = inputs_of(shape, run.device, run.suite.dtype)
    function = ours(shape, ids, path)
    got = way(function, values)
    expected = outcome(function, values)
    return {"ok": all(torch.equal(got[key], value) for key, value in expected.items())}


def _judged(run: Run, columns: Row, check: Callable[[], Row]) -> Iterator[Row]:
    """A row with what the check says; one that dies is wrong."""
    found: Row = {}
    why = run.attempt(columns["path"], lambda: found.update(check()))
    yield {**columns, **found} if why is None else {**columns, "failed": why, "ok": False}


def _compared(run: Run, shape: Shape, path: str, dtype: torch.dtype) -> Row:
    ids, values = inputs_of(shape, run.device, dtype)
    exact = wanted(shape, ids, values)
    function = ours(shape, ids, path)
    got = outcome(function, values)
    repeated = outcome(function, values)
    errors = {key: error_of(got[key], value) for key, value in exact.items()}
    worst = max(errors, key=lambda key: errors[key])
    same = all(torch.equal(got[key], repeated[key]) for key in got)
    ok = same and all(error <= TOLERANCES[dtype] for error in errors.values())
    return {"worst": worst, "error": errors[worst], "same bits again": same, "ok": ok}


def _decoding(device: torch.device, dtype: torch.dtype, tokens: int) -> Row:
    """The decode path: the experts that it chooses, and its error."""
    shape = Shape(tokens, 512, 264, (16, 4, 8, 12))
    _, values = inputs_of(shape, device, dtype)
    router = torch.randn(4, 512, device=device) / 22
    factors = (values["lora_A"], values["lora_B"])
    fixed = (shape.offsets, shape.scaling, values["out"])
    y, chosen = decoded(values["x"], *factors, router, 2, *fixed)
    doubles = {name: t.double() for name, t in values.items()}
    ids, weights = reference.top_k(doubles["x"], router.double(), 2)
    exact = reference.lora_mixture(
        doubles["x"],
        doubles["lora_A"],
        doubles["lora_B"],
        ids,
        weights,
        shape.offsets,
        shape.scaling,
        doubles["out"],
    )
    error = error_of(y, exact)
    return {"error": error, "ok": torch.equal(ids, chosen) and error <= TOLERANCES[dtype]}


def error_of(got: Tensor, exact: Tensor) -> float:
    """The largest error over the largest value."""
    if not exact.numel():
        return 0.0
    return float((got.double() - exact).abs().max() / exact.abs().max().clamp(1e-3))
