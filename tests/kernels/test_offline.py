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
from moelora_kernels import Layout, Plan, TopK, build_plan
from moelora_kernels.triton import decode, router, tiles
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
    h = h if poison is None else ops.poisoned.run(h, poison, dtype)
    ops.weight_grad.run(h, x, dtype, job)  # of lora_A, from fp32
    ops.input_grad.run(h, clean, dtype, job)
    assert dh.shape == own.shape


def screened_here(factor: torch.Tensor, dtype: torch.dtype, tokens: int, job: Job) -> tuple:
    """`autograd.screened` with the kernel recorded, for which a meta tensor's operator stands."""
    if job.path != "matmul":
        factor = in_dtype(factor, dtype, tokens, job)
        return factor, factor, None
    _, clean, poison = ops.screened.run(factor, dtype)
    return clean, clean, poison


def decoding(
    tokens: int,
    experts: int,
    rank: int,
    dtype: torch.dtype,
    master: bool = False,
    router: TopK | None = None,
) -> None:
    """Both launches of the decode path."""
    job = job_on("dense", tokens, experts, rank, 1)
    x = empty(tokens, D, dtype=dtype)
    factor = empty(experts * rank, D, dtype=FP32 if master else dtype)
    router = router or TopK(empty(experts, D))
    planes = decode.decode_shrink(x, router, factor, job)
    decode.decode_expand(planes, factor, router, job.ids, empty(tokens, 2), x, True, job)


def routing(tokens: int, experts: int, dtype: torch.dtype) -> None:
    """A router's logits and gradient, and where a token is routed before it is shrunk."""
    x = empty(tokens, D, dtype=dtype)
    ops.router_product.run(x, empty(experts, D))
    ops.router_grad.run(empty(tokens, experts), x)
    if tokens <= 64:
        router.route(x, TopK(empty(experts + 1, D), None, True, True, True), 2)


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


def every_launch(hip: str | None) -> list[Launch]:
    """One launch of each kernel with each of its default tiles, dtypes and flags, as a torch built
    for NVIDIA's chips or AMD's makes it.
    """
    with recorded() as launches, pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.version, "hip", hip)
        # An H200's: how many planes a decode expand holds depends on it.
        patch.setattr(tiles, "multiprocessors", lambda device: 132)
        # A model's experts are fp32 beside 16-bit activations: with those, and in fp32, every tile.
        for (dtype, master), tokens in product(((BF16, True), (FP32, False)), (1, 32, 8192)):
            for experts, rank in ((4, 4), (4, 8), (8, 8), (8, 16), (8, 32), (8, 48)):
                training("dense", tokens, experts, rank, dtype, master=master)
                training("matmul", tokens, experts, rank, dtype, master=master)
                if tokens <= 64 and experts * rank <= 128:
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
        for dtype, tokens in ((BF16, 1), (BF16, 32), (BF16, 8192), (FP16, 8192), (FP32, 8192)):
            for experts in (8, 64):
                routing(tokens, experts, dtype)
        routing(1, 1024, BF16)
        for dtype in (BF16, FP32):
            options = {"selection_bias": empty(64), "null_expert": True, "input_norm": True}
            decoding(64, 63, 64, dtype, True, TopK(empty(64, D), **options))
    return list({launch.name: launch for launch in launches}.values())


NVIDIA = every_launch(hip=None)
AMD = every_launch(hip="6.4")
WORK = [(of, on) for on in TARGETS for of in (AMD if on.startswith("gfx") else NVIDIA)]
# These multiply in IEEE fp32 at least for some sizes, or not at all.
NO_CORES = (
    "gate_grad_dense", "gate_grad_slots", "router", "router_grad", "gated", "poisoned", "screened"
)  # fmt: skip
NAMES = sorted({kernel_of(launch) for launch in NVIDIA})


@pytest.fixture(scope="module")
def figures() -> Iterator[dict[tuple[Launch, str], Figures]]:
    """What the compilers say of every launch on every target; printed as a table, a row for all
    tiles of a kernel.
    """
    with ProcessPoolExecutor(2, mp_context=get_context("fork")) as pool:
        results = dict(zip(WORK, pool.map(_compile, range(len(WORK)), chunksize=8)))
    yield results


def _compile(index: int) -> Figures:
    # Jitted functions do not travel between processes; a forked one has its own.
    launch, target = WORK[index]
    try:
        return compiled(launch, target)
    except RuntimeError:
        # Fails the test of its own kernel, and no other's.
        return Figures(0, 0, spilled=-1, tensor_cores=True, tf32=False, dependent=False)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", NAMES)
def test_no_spill_and_shared_memory_that_fits(name: str, target: str, figures: dict) -> None:
    for (launch, on), figures_of_launch in figures.items():
        if kernel_of(launch) == name and on == target:
            assert figures_of_launch.spilled == 0, launch.name
            assert figures_of_launch.shared <= SHARED[target], launch.name


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(
    "name", [name for name in NAMES if " fp32" not in name and name.split()[0] not in NO_CORES]
)
def test_16_bit_products_use_tensor_cores(name: str, target: str, figures: dict) -> None:
    launches = [
        f for (launch, on), f in figures.items() if kernel_of(launch) == name and on == target
    ]
    assert launches and all(f.tensor_cores for f in launches)


@pytest.mark.parametrize("target", TARGETS)
def test_a_router_of_much_bf16_uses_tensor_cores(target: str, figures: dict) -> None:
    found = {
        launch.kernel.__name__: figures_of_launch.tensor_cores
        for (launch, on), figures_of_launch in figures.items()
        if on == target and ("SPLIT", True) in launch.constants
    }
    assert found == {"router_kernel": True, "router_grad_kernel": True}


@pytest.mark.parametrize("target", TARGETS)
def test_nothing_is_rounded_to_tf32(target: str, figures: dict) -> None:
    assert not [of.name for (of, on), f in figures.items() if on == target and f.tf32]


@pytest.mark.parametrize("target", TARGETS)
def test_only_decoding_from_hopper_on_starts_while_the_launch_before_it_ends(
    target: str, figures: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And compiles without a spill there; nowhere else is the instruction."""
    assert not [of.name for (of, on), f in figures.items() if on == target and f.dependent]
    if target not in ("sm_90", "sm_100"):
        return
    monkeypatch.setattr(decode, "chained", lambda device: {"PDL": True, "launch_pdl": True})
    with recorded() as launches:
        decoding(1, 8, 16, BF16, master=True)
    assert len(launches) == 2
    for launch in launches:
        of_launch = compiled(launch, target)
        assert of_launch.dependent and of_launch.spilled == 0, launch.name


def test_who_may_start_early(monkeypatch: pytest.MonkeyPatch) -> None:
    """NVIDIA chips from Hopper on; no other, no CPU."""
    cuda = torch.device("cuda", 0)
    for capability, hip, wanted in (
        ((8, 0), None, False),
        ((8, 9), None, False),
        ((9, 0), None, True),
        ((12, 0), None, True),
        ((9, 4), "6.0", False),
    ):
        decode._chains.cache_clear()
        monkeypatch.setattr(torch.version, "hip", hip)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index, c=capability: c)
        assert decode.chained(cuda).get("launch_pdl", False) is wanted
    decode._chains.cache_clear()
    assert decode.chained(torch.device("cpu")) == {"PDL": False}


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
