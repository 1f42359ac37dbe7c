"""Compiling Triton kernels for GPUs that are not there: launches recorded on meta tensors, then
`triton.compile`.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# Bytes of shared memory that a program may have.
SHARED = {"sm_80": 163 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "gfx942": 64 << 10}
TENSOR_CORES = {
    "sm_80": r"mma\.sync",
    "sm_90": r"wgmma|mma\.sync",
    "sm_100": r"tcgen05|mma\.sync",
    "gfx942": r"v_mfma",
}
POINTERS = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.int64: "*i64",
    torch.int32: "*i32",
}
OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion", "launch_pdl")
FLAGS = ("RESIDENT", "GATED", "SPLIT", "SQUARES", "INPUT_NORM", "PDL")


@dataclass(frozen=True)
class Launch:
    """One launch as Triton would specialise it: dtypes, divisibility by 16, constants."""

    kernel: Any
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    divisible: tuple[int, ...]
    options: tuple[tuple[str, Any], ...]

    @property
    def name(self) -> str:
        """The kernel and its tile, as a row of the table."""
        kernel = self.kernel.__name__.removesuffix("_kernel")
        blocks = {k.removeprefix("BLOCK_"): v for k, v in self.constants if k.startswith("BLOCK_")}
        path = "".join(f" {v}" for k, v in self.constants if k == "PATH")
        flags = "".join(
            f" {k.lower()}"
            for k, v in self.constants
            if k in ("RESIDENT", "GATED", "SPLIT") and v is True
        )
        kinds = {kind for _, kind in self.signature}
        dtype = next((kind[1:] for kind in ("*bf16", "*fp16") if kind in kinds), "fp32")
        names = ("h",) if kernel.startswith("weight_grad") else ("factor", "lora_A", "lora_B")
        factors = {kind[1:] for name, kind in self.signature if name in names}
        if factors and factors != {dtype}:
            dtype += "/" + factors.pop()  # activations / factors
        blocks |= {k: v for k, v in self.constants if k == "SPLITS"}
        tile = " ".join(f"{k}={v}" for k, v in blocks.items())
        warps = dict(self.options)["num_warps"]
        return f"{kernel}{path}{flags} {dtype} {tile} w={warps}"


@dataclass(frozen=True)
class Figures:
    """What the compiler says of one launch on one target; spilled: None where it does not tell.

    tf32: whether fp32 numbers are rounded. dependent: whether it may start while the launch before
    it ends.
    """

    shared: int
    registers: int
    spilled: int
    tensor_cores: bool
    tf32: bool
    dependent: bool


@contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Launches in this block are noted and not run."""
    launches: list[Launch] = []
    run = triton.JITFunction.run

    def note(kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        launches.append(_specialised(kernel, args, kwargs))

    triton.JITFunction.run = note
    try:
        yield launches
    finally:
        triton.JITFunction.run = run


def _specialised(kernel: Any, args: tuple, kwargs: dict[str, Any]) -> Launch:
    options = {name: kwargs.pop(name) for name in OPTIONS if name in kwargs}
    values = {**dict(zip(kernel.arg_names, args)), **kwargs}
    signature, constants, divisible = {}, {}, []
    for place, parameter in enumerate(kernel.params):
        value = values[parameter.name]
        if (
            parameter.is_constexpr
            or value is None
            or value is True
            or (isinstance(value, int) and value == 1 and not parameter.do_not_specialize)
        ):
            signature[parameter.name], constants[parameter.name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = POINTERS[value.dtype]
            divisible.append(place)
        else:
            signature[parameter.name] = "i32"
            if value % 16 == 0 and not parameter.do_not_specialize:
                divisible.append(place)
    return Launch(
        kernel,
        tuple(signature.items()),
        tuple(constants.items()),
        tuple(divisible),
        tuple(options.items()),
    )


def compiled(launch: Launch, target: str) -> Figures:
    """Compile a launch for a target and read what the assembler made of it."""
    source = ASTSource(
        fn=launch.kernel,
        signature=dict(launch.signature),
        constexprs=dict(launch.constants),
        attrs={(place,): [["tt.divisibility", 16]] for place in launch.divisible},
    )
    binary = triton.compile(source, target=TARGETS[target], options=dict(launch.options))
    text = binary.asm["amdgcn" if target.startswith("gfx") else "ptx"]
    cores = re.search(TENSOR_CORES[target], text) is not None
    if target.startswith("gfx"):
        registers, spilled = (
            _number(rf"\.{key}:\s+(\d+)", text) for key in ("vgpr_count", "vgpr_spill_count")
        )
    else:
        usage = _resource_usage(binary.asm["cubin"])
        registers, spilled = _number(r"REG:(\d+)", usage), _number(r"STACK:(\d+)", usage)
    flags = (cores, "tf32" in text, "griddepcontrol" in text)
    return Figures(binary.metadata.shared, registers, spilled, *flags)


def _resource_usage(cubin: bytes) -> str:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        words = [str(tool), "-res-usage", file.name]
        return subprocess.run(words, capture_output=True, text=True, check=True).stdout


def _number(pattern: str, text: str) -> int:
    match = re.search(pattern, text)
    assert match, f"{pattern} is not in the compiler's report"
    return int(match[1])


def distinct(run: Callable[[], None]) -> list[Launch]:
    """The distinct launches of `run`."""
    with recorded() as launches:
        run()
    return list(dict.fromkeys(launches))
