"""`python -m moelora_kernels.triton.tune NAME`: time tiles on this GPU and keep the fastest in a
table called NAME.

Nothing is tuned while a program runs: a table is used where its name is passed as `tiles`.
"""

from __future__ import annotations

import argparse
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..layout import Layout
from ..plan import build_plan
from . import operators as ops
from .job import Job, job_of
from .tiles import (
    MIN_DOT,
    TUNED,
    Tile,
    default_tile,
    group_block,
    load_tuned,
    save_tuned,
    tile_for,
    tile_key,
)  # fmt: skip

SLOTS = 2
EXPERTS = 8
D = 4096
# What takes most of a training step's time first: a run that is cut short has tuned that.
CASES = [
    *(
        (kernel, tokens, width)
        for tokens, width in product((8192, 2048, 64), (128, 256, 384, 512))
        for kernel in ("shrink", "expand", "weight_grad", "gate_grad")
    ),
    *product(("expand_slots",), (8192, 64), (16, 64)),
    *product(("decode_shrink", "decode_expand"), (1, 16, 64), (128,)),
]


# Kernel, tokens, and R; of expand_slots one expert's rank.
TileCase = tuple[str, int, int]
# ‖got − the default tile's‖ over its own: the order of a sum may differ, nothing else.
TOLERANCES = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 1e-5}
# The slots were cut into tiles of BLOCK_T before; a program of decode_expand holds all ranks.
FIXED = {"expand_slots": "BLOCK_T", "decode_expand": "BLOCK_R"}
# Calls it, and says what it died of, or None.
Attempt = Callable[[str, Callable[[], object]], str | None]


@dataclass(frozen=True)
class Trial:
    """A tile and the seconds of a launch, or why it has none; wrong: it computes something else."""

    tile: Tile
    seconds: float = math.inf
    why_not: str | None = None
    wrong: bool = False


class WrongTile(AssertionError):
    """A tile that does not compute what the default one does."""


def neighbours(tile: Tile) -> list[Tile]:
    """The tile, and those that differ from it in one number by a factor of two, or in the stages by
    one.
    """
    others = [
        replace(tile, **{name: getattr(tile, name) * 2})
        for name in ("BLOCK_T", "BLOCK_R", "BLOCK_D")
    ]
    others += [
        replace(tile, **{name: getattr(tile, name) // 2})
        for name in ("BLOCK_T", "BLOCK_R", "BLOCK_D")
        if getattr(tile, name) > MIN_DOT
    ]
    others += [replace(tile, num_warps=warps) for warps in (2, 4, 8) if warps != tile.num_warps]
    others += [
        replace(tile, num_stages=tile.num_stages + step)
        for step in (-1, 1)
        if tile.num_stages + step > 0
    ]
    return [tile, *others]


def launcher(
    kernel: str, tokens: int, width: int, dtype: torch.dtype, device: torch.device, d: int = D
) -> Callable[[str], Any]:
    """A function of a table's name that launches the kernel once and returns what it computes;
    width: R, of expand_slots one expert's rank.
    """
    rank = width if kernel == "expand_slots" else max(1, width // EXPERTS)
    path = "grouped" if kernel == "expand_slots" else "dense"
    layout = Layout([range(0, EXPERTS * rank + 1, rank)], (1.0,) * EXPERTS, device)
    x = torch.randn(tokens, d, dtype=dtype, device=device)
    factor = torch.randn(EXPERTS * rank, d, dtype=dtype, device=device)
    ids = torch.rand(tokens, EXPERTS, device=device).topk(SLOTS).indices
    weights = torch.rand(tokens, SLOTS, device=device)
    router = torch.randn(EXPERTS, d, device=device)
    shape = {"total_rank": EXPERTS * rank, "path": path, "backend": "triton"}
    plan = build_plan(ids, weights, EXPERTS, **shape)
    default = job_of(plan, layout, learns=True)
    h = ops.shrink.run(x, factor, default)
    own = h if default.masked else h[:, :, 0]
    planes = ops.decode_shrink.run(x, router, factor, False, default) if tokens <= 64 else x

    def decode(job: Job) -> Tensor:
        y = x.clone()
        routed = (router, None, True, False, False, ids.clone(), weights.clone())
        ops.decode_expand_.run(planes, factor, *routed, y, True, job)
        return y

    launches: dict[str, Callable[[Job], Any]] = {
        "shrink": lambda job: ops.shrink.run(x, factor, job),
        "expand": lambda job: ops.expand.run(own, factor, None, weights, x, dtype, job),
        "expand_slots": lambda job: ops.expand.run(own, factor, None, weights, x, dtype, job),
        "weight_grad": lambda job: ops.weight_grad.run(own, x, dtype, job),
        "gate_grad": lambda job: ops.expand_backward.run(x, own, factor, weights, job),
        # Into how many planes the sum is cut follows from the tile.
        "decode_shrink": lambda job: ops.decode_shrink.run(x, router, factor, False, job).sum(0),
        "decode_expand": decode,
    }
    return lambda tiles: launches[kernel](default._replace(tiles=tiles))


def key_of(case: TileCase, dtype: torch.dtype) -> str:
    """The row of a table that a case is for."""
    kernel, tokens, width = case
    return tile_key(kernel, _held(kernel, tokens), width, dtype)


def _held(kernel: str, tokens: int) -> int:
    """Of expand_slots the tile holds the tokens that the slots were cut into."""
    return group_block(tokens, EXPERTS) if kernel == "expand_slots" else tokens


def trials(
    case: TileCase,
    dtype: torch.dtype,
    device: torch.device,
    seconds: Callable[[Callable[[], object]], float],
    attempt: Attempt | None = None,
    d: int = D,
) -> Iterator[Trial]:
    """Every tile of a case, the default one first: checked against it, then timed by `seconds`."""
    kernel, tokens, width = case
    launch = launcher(kernel, tokens, width, dtype, device, d)
    key = key_of(case, dtype)
    default = default_tile(kernel, _held(kernel, tokens), width, dtype.itemsize)
    wanted = _values(launch(""))
    tried = neighbours(default)
    if name := FIXED.get(kernel):
        tried = [tile for tile in tried if getattr(tile, name) == getattr(default, name)]
    with tempfile.TemporaryDirectory() as folder:
        for nth, tile in enumerate(tried):
            path = Path(folder) / f"{nth}.json"
            save_tuned(path, "", {key: tile})
            taken: list[float] = []

            def check_and_time(path: Path = path, taken: list[float] = taken) -> None:
                _check(_values(launch(str(path))), wanted, TOLERANCES[dtype])
                taken.append(seconds(partial(launch, str(path))))

            why = (attempt or _attempted)(shown(tile), check_and_time)
            if why is None:
                yield Trial(tile, taken[0])
            else:
                yield Trial(tile, why_not=why, wrong=WrongTile.__name__ in why)


def fastest(tried: Iterable[Trial]) -> Trial | None:
    """The fastest right tile, or None."""
    right = [trial for trial in tried if trial.why_not is None]
    return min(right, key=lambda trial: trial.seconds) if right else None


def shown(tile: Tile) -> str:
    """A tile in a word."""
    return "-".join(str(value) for value in asdict(tile).values())


def keep(path: Path, device: str, key: str, tile: Tile) -> None:
    """Add a row to a table, or make the table."""
    table = load_tuned(str(path)) if path.is_file() else {}
    save_tuned(path, device, {**table, key: tile})
    load_tuned.cache_clear()
    tile_for.cache_clear()


def tune(
    cases: Iterable[TileCase],
    dtypes: Iterable[torch.dtype],
    device: torch.device,
    seconds: Callable[[Callable[[], object]], float],
    found: Callable[[str, Tile], None],
    report: Callable[[str], None] = print,
    d: int = D,
) -> None:
    """Hand the fastest right tile of every case and dtype to `found` as soon as it is known."""
    for case, dtype in product(cases, dtypes):
        key = key_of(case, dtype)
        tried = list(trials(case, dtype, device, seconds, d=d))
        for trial in tried:
            if trial.why_not:
                report(f"{key}: {shown(trial.tile)} is left out: {trial.why_not}")
        best = fastest(tried)
        if best is not None:
            found(key, best.tile)
            share = best.seconds / tried[0].seconds
            report(f"{key}: {shown(best.tile)}, {share:.2f} of the default's time")


def _attempted(name: str, call: Callable[[], object]) -> str | None:
    try:
        call()
    # Any: a compiler has many ways to refuse a tile, and none may end the others.
    except Exception as error:
        return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
    return None


def _values(result: Any) -> list[Tensor]:
    """What a launch computed, kept from the next launch."""
    tensors = [result] if isinstance(result, Tensor) else list(result)
    return [tensor.detach().clone() for tensor in tensors]


def _check(got: list[Tensor], wanted: list[Tensor], allowed: float) -> None:
    """Raise WrongTile where a tensor is not what the default tile gives."""
    for nth, (value, other) in enumerate(zip(got, wanted, strict=True)):
        error = float((value.float() - other.float()).norm() / other.float().norm())
        if not error <= allowed:
            raise WrongTile(f"tensor {nth} is off by {error:.1e}")


def seconds_by_the_clock(launch: Callable[[], object]) -> float:
    """The seconds of one launch where there is no GPU."""
    start = time.perf_counter()
    launch()
    return time.perf_counter() - start


def seconds_on_gpu(launch: Callable[[], object], repeats: int = 20) -> float:
    """The median seconds of a launch after three that are not counted."""
    taken = []
    for nth in range(repeats + 3):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        launch()
        end.record()
        end.synchronize()
        if nth >= 3:
            taken.append(start.elapsed_time(end) / 1e3)
    return statistics.median(taken)


def main() -> None:
    """The command.

    Raises: SystemExit without a GPU.
    """
    parser = argparse.ArgumentParser(
        prog="python -m moelora_kernels.triton.tune", description=__doc__
    )
    parser.add_argument(
        "name", help="the table's name, or the path of a .json; for example nvidia-h200"
    )
    parser.add_argument(
        "--dtypes", nargs="+", default=["bfloat16"], choices=["bfloat16", "float16", "float32"]
    )
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit(
            "There is no GPU here to tune for: run this on the GPU that the table is for."
        )
    device = torch.device("cuda")
    dtypes = [getattr(torch, name) for name in arguments.dtypes]
    path = (
        Path(arguments.name)
        if arguments.name.endswith(".json")
        else TUNED / f"{arguments.name}.json"
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    found = partial(keep, path, torch.cuda.get_device_name(device))
    tune(CASES, dtypes, device, seconds_on_gpu, found)
    print(
        f"{len(load_tuned(str(path)))} tiles in {path.name}; use them with tiles={arguments.name!r}"
    )


if __name__ == "__main__":
    main()
