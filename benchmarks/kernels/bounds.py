"""How fast a linear with a mixture could be: bytes over bandwidth or operations over their rate."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from benchmarks.kernels.cases import Case


@dataclass(frozen=True)
class Peaks:
    """What a device reaches: bytes a second of a copy (read and written), operations a second of a
    product.
    """

    bytes_per_second: float
    flops_per_second: float


# A copy and a bf16 product as large as they get; for other devices both are measured in the run.
KNOWN_PEAKS = {"NVIDIA H200": Peaks(4.3e12, 790e12)}


@dataclass(frozen=True)
class Work:
    """The bytes that must move and the operations that must be done."""

    bytes: float
    flops: float

    def seconds(self, peaks: Peaks) -> float:
        """max(bytes / bandwidth, operations / rate): both go on at once."""
        return max(self.bytes / peaks.bytes_per_second, self.flops / peaks.flops_per_second)


def base_pass(case: Case, itemsize: int) -> Work:
    """The frozen product, forward or for dx: T·d_in, T·d_out and d_in·d_out elements,
    2·T·d_in·d_out operations.
    """
    moved = case.tokens * (case.d_in + case.d_out) + case.d_in * case.d_out
    return Work(moved * itemsize, 2 * case.tokens * case.d_in * case.d_out)


def used_experts(case: Case) -> float:
    """How many experts any token chooses, on average: E·(1 − (1 − K/E)^rows), an even choice."""
    rows = case.tokens // case.tokens_per_row
    return case.experts * (1 - (1 - case.top_k / case.experts) ** rows)


def added_forward(case: Case, itemsize: int, *, dense: bool = False) -> Work:
    """What a mixture adds to a forward pass: x read, y read and written, the used experts read.

    T·d_in + 2·T·d_out + used·r·(d_in + d_out) elements, 2·T·K·r·(d_in + d_out) operations;
    dense: all experts are read and multiplied. h stays near the processor.
    """
    experts = case.experts if dense else used_experts(case)
    times = case.experts if dense else case.top_k
    width = case.d_in + case.d_out
    moved = case.tokens * (case.d_in + 2 * case.d_out) + experts * case.rank * width
    return Work(moved * itemsize, 2 * case.tokens * times * case.rank * width)


def added_backward(
    case: Case, itemsize: int, *, dense: bool = False, with_base: bool = True
) -> Work:
    """What it adds to a backward pass: dy read twice, x once, dx read and written, experts read,
    gradients written.

    2·T·d_out + 3·T·d_in + (used + E)·r·(d_in + d_out) elements, 4·T·K·r·(d_in + d_out) operations.
    Without the base there is no dx to add to: 2·T·d_in.
    """
    experts = case.experts if dense else used_experts(case)
    times = case.experts if dense else case.top_k
    width = case.d_in + case.d_out
    moved = case.tokens * (2 * case.d_out + (3 if with_base else 2) * case.d_in)
    moved += (experts + case.experts) * case.rank * width
    return Work(moved * itemsize, 4 * case.tokens * times * case.rank * width)


def bound(
    case: Case, itemsize: int, peaks: Peaks, *, base: bool, adapter: bool, backward: bool
) -> float:
    """Seconds: the sum over what runs one after the other of each one's longest side."""
    parts = []
    if base:
        parts += [base_pass(case, itemsize)] * (2 if backward else 1)
    if adapter:
        parts.append(added_forward(case, itemsize))
        if backward:
            parts.append(added_backward(case, itemsize, with_base=base))
    return sum(part.seconds(peaks) for part in parts)


def peaks_of(device: torch.device, dtype: torch.dtype, quick: bool = False) -> tuple[Peaks, str]:
    """The device's peaks and where they are from."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    if name in KNOWN_PEAKS and dtype.itemsize == 2:
        return KNOWN_PEAKS[name], f"known for {name}"
    large = device.type == "cuda"
    size = 2**22 if quick else 2**28 if large else 2**26
    source = torch.ones(size // dtype.itemsize, dtype=dtype, device=device)
    target = torch.empty_like(source)
    side = 256 if quick else 8192 if large else 1024
    a = torch.randn(side, side, device=device).to(dtype)
    limit = 0.1 if quick else 2.0
    copy = _fastest(lambda: target.copy_(source), device, limit)
    product = _fastest(lambda: a @ a, device, limit)
    return Peaks(2 * size / copy, 2 * side**3 / product), "measured in this run"


def _fastest(call: Callable[[], object], device: torch.device, limit: float) -> float:
    """The shortest of the calls that begin within `limit` seconds: others may use the machine for a
    while.
    """
    seconds = []
    begin = time.perf_counter()
    while time.perf_counter() < begin + limit:
        _wait(device)
        start = time.perf_counter()
        call()
        _wait(device)
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
