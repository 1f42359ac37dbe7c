"""`python -m moelora_kernels.triton.tune NAME`: time tiles on this GPU and keep the fastest in a
table called NAME.

Nothing is tuned while a program runs: a table is used where its name is passed as `tiles`.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
import triton

from .decode import decode_expand, decode_shrink
from .expand import expand
from .fused import fused
from .gate_grad import gate_grad
from .layout import layout, scales
from .shrink import shrink_planes
from .slot_map import slot_map
from .tiles import (
    MIN_DOT,
    TUNED,
    Tile,
    default_tile,
    group_block,
    save_tuned,
    tile_key,
)  # fmt: skip
from .weight_grad import weight_grad

SLOTS = 2
EXPERTS = 8
D = 4096
CASES = [
    *product(("shrink", "expand", "weight_grad", "gate_grad"), (64, 2048, 8192), (128, 384, 512)),
    *product(("expand_slots",), (64, 8192), (16, 64)),
    *product(("fused",), (64, 2048), (128,)),
    *product(("decode_shrink", "decode_expand"), (1, 16, 64), (128,)),
]


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
    kernel: str, tokens: int, width: int, dtype: torch.dtype, device: torch.device
) -> Callable[[str], Any]:
    """A function of a table's name that launches the kernel once; width: R, of expand_slots one
    expert's rank.
    """
    rank = width if kernel == "expand_slots" else max(1, width // EXPERTS)
    site = layout(tuple(range(0, EXPERTS * rank + 1, rank)), EXPERTS, device)
    scaling = scales((1.0,) * EXPERTS, device)
    x = torch.randn(tokens, D, dtype=dtype, device=device)
    factor = torch.randn(EXPERTS * rank, D, dtype=dtype, device=device)
    ids = torch.rand(tokens, EXPERTS, device=device).topk(SLOTS).indices
    weights = torch.rand(tokens, SLOTS, device=device)
    router = torch.randn(EXPERTS, D, device=device)
    path = "grouped" if kernel == "expand_slots" else "dense"
    slots = slot_map(ids, 1, EXPERTS, group_block(tokens, EXPERTS)) if path == "grouped" else None
    planes = shrink_planes(x, factor, ids, slots, site, path, 1, "")
    h = planes.sum(0)
    y = torch.empty_like(x)
    gate = (weights, scaling)
    own = h if path == "dense" else h[:, :, 0]
    logits = torch.randn(1, tokens, EXPERTS, device=device)
    return {
        "shrink": lambda t: shrink_planes(x, factor, ids, slots, site, path, 1, t),
        "expand": lambda t: expand(own, factor, x, gate, ids, slots, site, path, 1, dtype, t, y),
        "expand_slots": lambda t: expand(
            own, factor, x, gate, ids, slots, site, path, 1, dtype, t, y
        ),
        "weight_grad": lambda t: weight_grad(own, x, slots, site, path, dtype, t),
        "gate_grad": lambda t: gate_grad(
            planes, own, weights, scaling, ids, site, path, 1, dtype, t
        ),
        "fused": lambda t: fused(x, factor, factor, scaling, site, ids, weights, x, y, None, 1, t),
        "decode_shrink": lambda t: decode_shrink(x, router, factor, t),
        "decode_expand": lambda t: decode_expand(
            logits, h[None], factor, None, True, scaling, site, ids, weights, x, y, t
        ),
    }[kernel]


def tune(
    cases: Iterable[tuple[str, int, int]],
    dtypes: Iterable[torch.dtype],
    device: torch.device,
    seconds: Callable[[Callable[[], object]], float],
    report: Callable[[str], None] = print,
) -> dict[str, Tile]:
    """The fastest tile of every case and dtype, by the time that `seconds` takes of a launch."""
    table = {}
    with tempfile.TemporaryDirectory() as folder:
        for (kernel, tokens, width), dtype in product(cases, dtypes):
            launch = launcher(kernel, tokens, width, dtype, device)
            # Of expand_slots the tile holds the tokens that the slots were cut into, and not
            # another number.
            held = group_block(tokens, EXPERTS) if kernel == "expand_slots" else tokens
            key = tile_key(kernel, held, width, dtype)
            default = default_tile(kernel, held, width, dtype.itemsize)
            times: dict[Tile, float] = {}
            for nth, tile in enumerate(neighbours(default)):
                path = Path(folder) / f"{len(table)}-{nth}-{key.replace(' ', '-')}.json"
                save_tuned(path, "", {key: tile})
                try:
                    times[tile] = seconds(partial(launch, str(path)))
                except (triton.runtime.errors.OutOfResources, triton.CompilationError) as error:
                    report(f"{key}: {tile} does not run: {type(error).__name__}")
            table[key] = min(times, key=lambda tile: times[tile])
            share = times[table[key]] / times[default]
            report(f"{key}: {table[key]}, {share:.2f} of the default's time")
    return table


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
    table = tune(CASES, dtypes, device, seconds_on_gpu)
    path = (
        Path(arguments.name)
        if arguments.name.endswith(".json")
        else TUNED / f"{arguments.name}.json"
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    save_tuned(path, torch.cuda.get_device_name(device), table)
    print(f"{len(table)} tiles in {path.name}; use them with tiles={arguments.name!r}")


if __name__ == "__main__":
    main()
