"""Host time of the Triton backend with its launches replaced by nothing: what Python and torch cost
a linear before any GPU has work.

python -m benchmarks.bench_host [--compare FOLDER]; with a second checkout's root in turns with it.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

# The kernels must not be interpreted: a launch that does nothing takes their place.
os.environ.pop("TRITON_INTERPRET", None)

import torch
import triton

from benchmarks.harness import RESULTS, save, table

# Small, for on a CPU the work of torch between launches is done by the host as well.
TOKENS = 64
WIDTH = 16
# Microseconds: what a site of one linear may cost at most.
TARGETS = {"dense E=8, forward+backward": 300.0, "decode, a site of 3 linears": 100.0}
# (what, over what): the most the first may cost of the second.
RATIO = ("E=1024, forward+backward", "E=8 grouped, forward+backward", 1.3)


class NoLaunch:
    """In a kernel's place: indexed by a grid and called, it does nothing."""

    def __getitem__(self, grid: object) -> Callable[..., None]:
        return lambda *args, **kwargs: None


def without_launches() -> None:
    """Replace every jitted kernel in the modules of the Triton backend."""
    for name, module in list(sys.modules.items()):
        if not name.startswith("moelora_kernels.triton"):
            continue
        for attribute, value in list(vars(module).items()):
            if isinstance(value, triton.JITFunction) and attribute.endswith("kernel"):
                setattr(module, attribute, NoLaunch())


def cases() -> dict[str, Callable[[], object]]:
    """What is measured, by name."""
    found: dict[str, Callable[[], object]] = {}
    for experts, rank, path in ((8, 16, "dense"), (8, 16, "grouped"), (1024, 8, "grouped")):
        step = _linear(experts, rank, path)
        name = f"E={experts}" if experts > 8 else f"E=8 {path}" if path != "dense" else "dense E=8"
        found[f"{name}, forward+backward"] = step
    found["decode, a site of 3 linears"] = _decode(3)
    return found


def _linear(experts: int, rank: int, path: str) -> Callable[[], object]:
    """A forward and a backward pass of one linear, its plan's included."""
    from moelora_kernels import build_plan
    from moelora_kernels import triton as module

    # Older checkouts' functions take other arguments.
    backend: Any = module

    x = torch.randn(TOKENS, WIDTH, requires_grad=True)
    lora_A = torch.randn(experts * rank, WIDTH, requires_grad=True)
    lora_B = torch.randn(experts * rank, WIDTH, requires_grad=True)
    ids = torch.randint(0, experts, (TOKENS, 2))
    weights = torch.rand(TOKENS, 2, requires_grad=True)
    output = torch.randn(TOKENS, WIDTH)
    of_A, of_B = _layouts(experts, rank, 1)

    def step() -> None:
        total = experts * rank
        plan = build_plan(ids, weights, experts, total_rank=total, path=path, complete=True)
        (h,) = backend.shrink(x, lora_A, *of_A, plan)
        y = backend.expand(h, lora_B, *of_B, plan, output)
        y.backward(output)

    return step


def _decode(linears: int) -> Callable[[], object]:
    """One token through a site whose router the kernels run."""
    from moelora_kernels import TopK, build_decode_plan
    from moelora_kernels import triton as module

    # Older checkouts' functions take other arguments.
    backend: Any = module

    x = torch.randn(1, WIDTH)
    router = TopK(torch.randn(8, WIDTH))
    lora_A = torch.randn(linears * 128, WIDTH)
    lora_B = torch.randn(128, WIDTH)
    outputs = [torch.randn(1, WIDTH) for _ in range(linears)]
    of_A, of_B = _layouts(8, 16, linears)

    @torch.no_grad()
    def step() -> None:
        plan = build_decode_plan(router, 1, 2)
        hs = backend.shrink(x, lora_A, *of_A, plan)
        for h, output in zip(hs, outputs, strict=True):
            backend.expand(h, lora_B, *of_B, plan, output, inplace=True)

    return step


def _layouts(experts: int, rank: int, linears: int) -> tuple[Any, Any]:
    """What stands for a factor's layout in this checkout: `Layout`s, or offsets in older ones."""
    offsets = tuple(range(0, experts * rank + 1, rank))
    scaling = (2.0,) * experts
    try:
        from moelora_kernels import Layout
    except ImportError:
        return ((offsets,) * linears,), (offsets, scaling)
    return (Layout((offsets,) * linears),), (Layout((offsets,), scaling),)


def measure(seconds: float) -> dict[str, float]:
    """Microseconds of each case: the least median of five rounds in turns."""
    import moelora_kernels.triton  # noqa: F401

    without_launches()
    torch.set_num_threads(1)
    steps = cases()
    rounds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(5):
        for name, step in steps.items():
            end = time.perf_counter() + seconds
            times = []
            while time.perf_counter() < end or len(times) < 20:
                start = time.thread_time()
                step()
                times.append(time.thread_time() - start)
            rounds[name].append(statistics.median(times) * 1e6)
    return {name: min(values) for name, values in rounds.items()}


def measured_in(root: Path, settings: argparse.Namespace) -> dict[str, float]:
    """`measure` in a process of its own, of the kernels of the checkout at `root`."""
    words = [sys.executable, "-m", "benchmarks.bench_host", "--here"]
    here = Path(__file__).parents[1]
    path = os.pathsep.join([str(root / "kernels"), str(here)])
    result = subprocess.run(
        [*words, "--seconds", str(settings.seconds)],
        capture_output=True,
        text=True,
        check=True,
        cwd=here,
        env={**os.environ, "PYTHONPATH": path},
    )
    return json.loads(result.stdout.splitlines()[-1])


def main(words: list[str] | None = None) -> None:
    """Measure, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=0.3, help="a round of a case")
    parser.add_argument("--rounds", type=int, default=3, help="processes of each checkout")
    parser.add_argument("--compare", type=Path, help="the root of another checkout")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    settings = parser.parse_args(words)
    if settings.here:
        print(json.dumps(measure(settings.seconds)))
        return
    roots = {"us": Path(__file__).parents[1]}
    if settings.compare:
        roots["us, other"] = settings.compare.resolve()
    taken = [
        {column: measured_in(root, settings) for column, root in roots.items()}
        for _ in range(settings.rounds)
    ]
    rows = []
    for name in taken[0]["us"]:
        row = {"what": name} | {c: statistics.median(t[c][name] for t in taken) for c in roots}
        rows.append(row | {"target": TARGETS.get(name)})
    many, few, limit = RATIO
    ratio = statistics.median(t["us"][many] / t["us"][few] for t in taken)
    rows.append({"what": f"{many} / {few}", "us": ratio, "target": limit})
    shown = {"seconds": settings.seconds, "rounds": settings.rounds}
    path = save("host", shown, rows, settings.output)
    print(table(rows), f"\n{path}")


if __name__ == "__main__":
    main()
