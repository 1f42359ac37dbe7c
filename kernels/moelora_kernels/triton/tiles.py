"""Block sizes, warps and splits of every kernel: functions of the shape, or a device's tuned table
by name.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

TUNED = Path(__file__).parent / "tuned"
KERNELS = (
    "shrink",
    "expand",
    "expand_slots",
    "weight_grad",
    "gate_grad",
    "decode_shrink",
    "decode_expand",
)
# Not worth a tuned table.
ROUTING = ("router", "router_grad", "top_k")
MIN_DOT = 16  # tl.dot takes no smaller side
# Features in one fp32 product of a router's: without tensor cores a thread holds whole rows, which
# with more of them spill.
ROUTER_DEPTH = 16
# Bytes that a pass finds in the cache again: a third of the 50 MB of an H100 or H200, of which each
# half of the chip keeps some lines twice.
CACHED = 16 << 20


@dataclass(frozen=True)
class Tile:
    """Tokens, ranks and features a program holds at once; the warps that share them; the loads
    under way.
    """

    BLOCK_T: int
    BLOCK_R: int
    BLOCK_D: int
    num_warps: int = 4
    num_stages: int = 3


def default_tile(kernel: str, num_tokens: int, width: int, itemsize: int) -> Tile:
    """The tile of a kernel for tokens (of a row, on the sequence path), ranks in one product and
    bytes an element.

    No spill and shared memory within the chip's on sm_80, sm_90, sm_100, gfx942, with factors of
    the same dtype or fp32, by Triton 3.6 and 3.9: the compile tests hold it.
    """
    if kernel not in KERNELS + ROUTING:
        raise ValueError(f"kernel={kernel!r} is unknown: choose one of {', '.join(KERNELS)}")
    if kernel == "gate_grad":
        return Tile(16, fitting(width, 64), MIN_DOT, 8 if width > 32 else 4, 1)
    if kernel == "top_k":
        return Tile(1, fitting(width, 2048), MIN_DOT, 8 if width > 512 else 4, 1)
    return (
        _tile_of_16_bits(kernel, num_tokens, width)
        if itemsize <= 2
        else _tile_of_fp32(kernel, num_tokens, width)
    )


def _tile_of_16_bits(kernel: str, num_tokens: int, width: int) -> Tile:
    tokens = fitting(num_tokens, 64)
    if kernel == "shrink":
        ranks = fitting(width, 128)
        if (tokens, ranks) == (16, 128):
            return Tile(16, 128, 32, 4)
        if num_tokens > 64 and ranks == 128:
            return Tile(128, 128, 64, 8, 3)
        # With fp32 factors a third stage of these spills.
        stages = 2 if ranks == 128 or (tokens, ranks) == (64, 32) else 3
        return Tile(tokens, ranks, 64, 8 if ranks == 64 <= 2 * tokens else 4, stages)
    if kernel == "expand":
        if tokens <= 32 and width > 128:
            if tokens == 32:
                return Tile(32, 32, 32, 8, 3)
            return Tile(16, 256, 32, 8, 1) if width <= 256 else Tile(16, 16, 64, 4, 2)
        if num_tokens > 64 and width > 128:
            return Tile(64, 32, 128, 8, 2)
        ranks = fitting(width, 128) if width <= 128 else 32
        stages = 1 if ranks == 128 and tokens < 64 else 2
        warps = 8 if tokens == 64 else 4
        return Tile(tokens, ranks, 128 if width <= 64 else 64, warps, stages)
    if kernel == "expand_slots":
        ranks = fitting(width, 64)
        # Two stages of the largest put their barriers on the stack of sm_100.
        stages = 1 if tokens == 64 and ranks >= 32 else 2
        return Tile(tokens, ranks, 64 if tokens == 16 else 128, 8 if tokens == 64 else 4, stages)
    if kernel == "weight_grad":
        ranks = fitting(width, 128)
        if ranks == 128:
            # With as many tokens at once as of all experts, sorted ones of fp32 spill.
            return Tile(64, 128, 128, 8, 2) if num_tokens > 64 else Tile(32, 128, 128, 8, 3)
        tokens = 16 if num_tokens <= 16 else 64
        warps = 8 if ranks == 64 or (ranks == 32 and tokens == 64) else 4
        return Tile(tokens, ranks, 128 if ranks == 64 else 64, warps)
    if kernel == "router":
        return Tile(tokens, fitting(width, 64), 64, 4, 3)
    if kernel == "router_grad":
        return Tile(64, fitting(width, 64), 64, 4, 3)
    if kernel == "decode_shrink":
        return Tile(tokens, fitting(width, 32), 128, 4)
    return Tile(16, fitting(width, 128), 32, 8 if width > 64 else 4, 1)


def _tile_of_fp32(kernel: str, num_tokens: int, width: int) -> Tile:
    """Half the depth of 16 bits: tiles are twice as large, and no tensor core multiplies them."""
    tokens = fitting(num_tokens, 32)
    if kernel == "shrink":
        return Tile(tokens, fitting(width, 64), 32, 4)
    if kernel == "expand" and width > 32:
        # A second stage of these spills.
        return Tile(32, 16, 64, 8, 1) if tokens == 32 else Tile(16, 16, 32, 4, 1)
    if kernel == "expand_slots" and tokens == 32:
        return Tile(32, 16, 64, 8, 2)
    if kernel in ("expand", "expand_slots"):
        return Tile(tokens, fitting(width, 32), 64, 8 if tokens == 32 else 4, 2)
    if kernel in ("weight_grad", "router_grad"):
        return Tile(32, fitting(width, 32), 64, 4)
    if kernel == "router":
        return Tile(tokens, fitting(width, 32), ROUTER_DEPTH, 4)
    if kernel == "decode_shrink":
        return Tile(tokens, fitting(width, 32), 64, 4)
    # With 16 tokens or ranks it spills: each thread then holds whole rows of the other side.
    return Tile(32, 32, 32, 8, 2)


@lru_cache(maxsize=1024)
def tile_for(kernel: str, num_tokens: int, width: int, dtype: torch.dtype, tiles: str) -> Tile:
    """The tuned tile where the table called `tiles` has one for these sizes, else the default."""
    if tiles:
        tuned = load_tuned(tiles).get(tile_key(kernel, num_tokens, width, dtype))
        if tuned is not None:
            return tuned
    return default_tile(kernel, num_tokens, width, dtype.itemsize)


def with_block_t(tile: Tile, block: int | None) -> Tile:
    """The tile with the tokens that the slots were cut into, where they were."""
    return tile if block is None else replace(tile, BLOCK_T=block)


def with_wide_rows(tile: Tile, rows: int, d: int, x: Tensor) -> Tile:
    """The tile of weight_grad, wider where the programs of many experts would only fetch a few
    tokens each: 4 or 2 times for ranks of 16 bits up to 16 or 32, while the chip stays full.
    """
    most = MIN_DOT * 4 // tile.BLOCK_R if x.itemsize == 2 else 1
    for times in (4, 2):
        programs = rows * ceil_div(d, tile.BLOCK_D * times)
        if times <= most and programs >= 16 * multiprocessors(x.device):
            return replace(tile, BLOCK_D=tile.BLOCK_D * times)
    return tile


def tile_key(kernel: str, num_tokens: int, width: int, dtype: torch.dtype) -> str:
    """The row of a tuned table, tokens and ranks rounded up to a power of two."""
    tokens = fitting(num_tokens, 8192)
    ranks = fitting(width, 4096)
    return f"{kernel} T={tokens} R={ranks} {str(dtype).removeprefix('torch.')}"


@lru_cache(maxsize=16)
def load_tuned(name: str) -> dict[str, Tile]:
    """The table that `python -m moelora_kernels.triton.tune` wrote: a name of this package's, or a
    path.

    Raises: ValueError for a table that is not there or is not a table.
    """
    path = Path(name) if name.endswith(".json") else TUNED / f"{name}.json"
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in TUNED.glob("*.json"))) or "none yet"
        raise ValueError(
            f"tiles={name!r}: there is no {path.name}: name one of the package's tables ({known}),"
            " give the path of a .json, or write one with python -m moelora_kernels.triton.tune"
        )
    try:
        return {
            key: Tile(**fields)
            for key, fields in json.loads(path.read_text("utf-8"))["tiles"].items()
        }
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
        raise ValueError(
            f"tiles={name!r}: {path.name} is not a table of tiles ({error}): tune again"
        ) from error


def save_tuned(path: Path, device: str, table: dict[str, Tile]) -> None:
    """Write a table of tiles for `load_tuned`."""
    content = {
        "device": device,
        "tiles": {key: asdict(tile) for key, tile in sorted(table.items())},
    }
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def launch_options(tile: Tile) -> dict[str, int | bool]:
    """The keyword arguments of a launch; Triton's default for fused multiply-adds changes between
    versions.
    """
    # Not asdict, which copies deeply: half of what a launch would cost the host.
    return {**vars(tile), "enable_fp_fusion": True}


def split_count(
    programs: int, d: int, block_d: int, device: torch.device, at_least: int = 1
) -> tuple[int, int]:
    """Into how many parts of d a sum is split so that the chip is busy, and d a part.

    clamp(2 · SMs / programs, at_least, min(16, d / 256)): calculated, not measured.
    """
    splits = max(2 * multiprocessors(device) // max(programs, 1), at_least)
    splits = max(1, min(splits, 16, d // 256))
    part = ceil_div(ceil_div(d, splits), block_d) * block_d
    return ceil_div(d, part), part


def power_splits(
    programs: int, d: int, block_d: int, device: torch.device, most: int = 16
) -> tuple[int, int]:
    """`split_count` with a power of two of parts, which a kernel can load at once; the last may be
    empty.
    """
    splits, _ = split_count(programs, d, block_d, device)
    splits = 1 << (min(splits, most).bit_length() - 1)
    return splits, ceil_div(ceil_div(d, splits), block_d) * block_d


@lru_cache
def multiprocessors(device: torch.device) -> int:
    """The device's multiprocessors; 4 stand in where there is no GPU, so that the interpreter
    splits sums as well.
    """
    if device.type != "cuda":
        return 4
    return torch.cuda.get_device_properties(device).multi_processor_count


def group_block(num_tokens: int, num_experts: int) -> int:
    """Tokens in a tile of one expert's slots: what an expert gets on average, 16 to 64."""
    # Comparisons alone: a traced number of tokens then has three graphs and not one for each.
    if num_tokens <= 16 * num_experts:
        return 16
    return 32 if num_tokens <= 32 * num_experts else 64


def out_tiles(programs: int, device: torch.device) -> int:
    """How many tiles of d one program of expand writes: more keep its h longer, fewer fill the
    chip.
    """
    return max(1, min(8, programs // (4 * multiprocessors(device))))


def columns_at_once(num_tokens: int, d: int, itemsize: int, block_d: int) -> int:
    """How many columns of y all slots are added to before the next ones, a multiple of block_d.

    Passes over more than the cache holds read y from memory again; two tiles at least are a grid.
    """
    if num_tokens * d * itemsize <= 2 * CACHED:
        return max(d, 1)
    return max(2, CACHED // (num_tokens * itemsize * block_d)) * block_d


def splits_in_cache(num_tokens: int, d: int, itemsize: int, slots: int, width: int) -> int:
    """Into how many parts of d a shrink of `slots` slots of `width` ranks is split at least: as
    many as let a slot find in the cache what another one read, where the planes cost half of that
    or less.
    """
    size = num_tokens * d * itemsize
    splits = ceil_div(size, CACHED)
    planes = 2 * 4 * splits * num_tokens * slots * width  # written and read, fp32
    return splits if size > 2 * CACHED and 2 * planes <= (slots - 1) * size else 1


def fitting(size: int, largest: int) -> int:
    """The smallest power of two that holds `size`, 16 to `largest`."""
    return max(MIN_DOT, min(largest, 1 << max(size - 1, 0).bit_length()))


def ceil_div(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)
