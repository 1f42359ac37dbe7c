"""Every default tile of every kernel compiles for every chip: no spill, shared memory that fits,
tensor cores.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from multiprocessing import get_context

import pytest
import torch
from moelora_kernels import Layout, Plan, build_plan
from moelora_kernels.dispatch import DECODE_RANKS
from moelora_kernels.triton import operators as ops
from moelora_kernels.triton.autograd import in_dtype
from moelora_kernels.triton.job import Job, job_of

from tests.kernels.offline import SHARED, TARGETS, Figures, Launch, compiled, recorded

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
D = 4096


def training(
    path: str,
    rows: int,
    experts: int,
    rank: int,
    dtype: torch.dtype,
    tokens_per_row: int = 1,
    master: bool = False,
) -> None:
    """The forward and backward launches of one linear of `experts` of equal rank; master: factors
    in fp32.
    """
    job = job_on(path, rows, experts, rank, tokens_per_row)
    tokens = rows * tokens_per_row
    x = empty(tokens, D, dtype=dtype)
    factor = empty(experts * rank, D, dtype=FP32 if master else dtype)
    factor, clean, poison = screened_here(factor, dtype, tokens, job)
    h = ops.shrink.run(x, factor, job)
    own = h if job.masked else h[:, :, 0]
    weights = empty(rows, 2)
    ops.expand.run(own, clean, poison, weights, x, dtype, job)
    dh, gated, _ = ops.expand_backward.run(x, own, factor, weights, job)
    ops.weight_grad.run(gated if job.masked else gated.unsqueeze(2), x, dtype, job)  # of lora_B
    h = h if poison is None else ops.poisoned.run(h, poison, dtype, job)
    ops.weight_grad.run(h, x, dtype, job)  # of lora_A, from fp32
    ops.input_grad.run(h, clean, dtype, job)
    assert dh.shape == own.shape


def screened_here(factor: torch.Tensor, dtype: torch.dtype, tokens: int, job: Job) -> tuple:
    """`autograd.screened` with the kernel recorded, for which a meta tensor's operator stands."""
    if job.path != "matmul":
        factor = in_dtype(factor, dtype, tokens, job)
        return factor, factor, None
    _, clean, poison = ops.screened.run(factor, dtype, job)
    return clean, clean, poison


def decoding(
    tokens: int, experts: int, rank: int, dtype: torch.dtype, master: bool = False
) -> None:
    """Both launches of the decode path."""
    job = job_on("dense", tokens, experts, rank, 1)
    x = empty(tokens, D, dtype=dtype)
    factor = empty(experts * rank, D, dtype=FP32 if master else dtype)
    logits, h = ops.decode_shrink.run(x, empty(experts, D), factor, job)
    routing = (job.ids, empty(tokens, 2))
    ops.decode_expand_.run(logits, h, factor, None, True, *routing, x, True, job)


def job_on(path: str, rows: int, experts: int, rank: int, tokens_per_row: int) -> Job:
    """The job of a training step on the meta device."""
    layout = Layout([range(0, experts * rank + 1, rank)], (1.0,) * experts, "meta")
    ids, weights = empty(rows, 2, dtype=torch.int64), empty(rows, 2)
    total = experts * rank
    per_row = {"total_rank": total, "tokens_per_row": tokens_per_row, "path": path}
    plan: Plan = build_plan(ids, weights, experts, **per_row, backend="triton")
    return job_of(plan, layout, learns=True)


def kernel_of(launch: Launch) -> str:
    """The kernel, its path and dtype, without its tile."""
    return launch.name.partition(" T=")[0].partition(" E=")[0].partition(" K=")[0]


def empty(*shape: int, dtype: torch.dtype = FP32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def every_launch() -> list[Launch]:
    """One launch of each kernel with each of its default tiles, dtypes and flags."""
    with recorded() as launches:
        # A model's experts are fp32 beside 16-bit activations: with those, and in fp32, every tile.
        for (dtype, master), tokens in product(((BF16, True), (FP32, False)), (1, 32, 8192)):
            for experts, rank in ((4, 4), (4, 8), (8, 8), (8, 16), (8, 32), (8, 48)):
                training("dense", tokens, experts, rank, dtype, master=master)
                training("matmul", tokens, experts, rank, dtype, master=master)
                if tokens <= 64 and experts * rank <= DECODE_RANKS:
                    decoding(tokens, experts, rank, dtype, master)
        for (dtype, master), rank in product(((BF16, True), (FP32, False)), (16, 32, 64, 128, 256)):
            for tokens in (8192, 2048, 512):
                training("grouped", tokens, 64, rank, dtype, master=master)
            if rank <= 32:  # so few experts that the weights' gradients keep small tiles
                training("grouped", 8192, 1, rank, dtype, master=master)
                training("grouped", 8192, 2, rank, dtype, master=master)
            for tokens_per_row in (1, 32, 1024):
                training("sequence", 8, 8, rank, dtype, tokens_per_row, master)
        # Factors of 16 bits, which take half the room, are for who calls the kernels: the usual
        # shapes.
        for dtype in (BF16, FP16):
            training("dense", 8192, 8, 16, dtype)
            training("dense", 1, 8, 16, dtype)
            training("grouped", 8192, 64, 16, dtype)
            training("sequence", 8, 8, 16, dtype, 1024)
            decoding(1, 8, 16, dtype)
    return list({launch.name: launch for launch in launches}.values())


LAUNCHES = every_launch()
WITHOUT_PRODUCTS = ("gate_grad", "gated", "poisoned", "screened")
NAMES = sorted({kernel_of(launch) for launch in LAUNCHES})


@pytest.fixture(scope="module")
def figures() -> Iterator[dict[tuple[Launch, str], Figures]]:
    """What the compilers say of every launch on every target; printed as a table, a row for all
    tiles of a kernel.
    """
    work = list(product(LAUNCHES, TARGETS))
    with ProcessPoolExecutor(2, mp_context=get_context("fork")) as pool:
        results = dict(zip(work, pool.map(_compile, range(len(work)), chunksize=8)))
    yield results


def _compile(index: int) -> Figures:
    # Jitted functions do not travel between processes; a forked one has its own.
    launch, target = list(product(LAUNCHES, TARGETS))[index]
    return compiled(launch, target)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", NAMES)
def test_no_spill_and_shared_memory_that_fits(name: str, target: str, figures: dict) -> None:
    for (launch, on), figures_of_launch in figures.items():
        if kernel_of(launch) == name and on == target:
            assert figures_of_launch.spilled == 0, launch.name
            assert figures_of_launch.shared <= SHARED[target], launch.name


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(
    "name", [n for n in NAMES if " fp32" not in n and not n.startswith(WITHOUT_PRODUCTS)]
)
def test_16_bit_products_use_tensor_cores(name: str, target: str, figures: dict) -> None:
    launches = [
        f for (launch, on), f in figures.items() if kernel_of(launch) == name and on == target
    ]
    assert launches and all(f.tensor_cores for f in launches)


def test_the_table(figures: dict, capsys: pytest.CaptureFixture) -> None:
    """Shared KiB and registers a thread of the smallest and largest tile, for the closing note."""
    lines = ["", "kernel (tiles): shared KiB, registers a thread, on " + ", ".join(TARGETS)]
    for name in NAMES:
        cells = []
        for target in TARGETS:
            launches = [
                f
                for (launch, on), f in figures.items()
                if kernel_of(launch) == name and on == target
            ]
            shared, registers = [f.shared >> 10 for f in launches], [f.registers for f in launches]
            cells.append(f"{min(shared)}-{max(shared)}K {min(registers)}-{max(registers)}r")
        lines.append(f"{name} ({len(launches)}): " + " | ".join(cells))
    with capsys.disabled():
        print("\n".join(lines))
    assert len(lines) == 2 + len(NAMES)
