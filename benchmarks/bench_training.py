"""Training step on CPU: mixtures against PEFT's single LoRA, time in turns, memory in processes of
their own.

python -m benchmarks.bench_training
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.candidates import Candidate, build, load_base
from benchmarks.harness import cpu_parser, in_turns, save_and_print

LORA = Candidate("PEFT LoRA r=32", "lora", r=32)
FEW = Candidate("mixture E=8 r=16 K=2", "mixture", r=16, experts=8, top_k=2)
FEW_SMALL = Candidate("mixture E=8 r=8 K=2", "mixture", r=8, experts=8, top_k=2)
MANY = Candidate("mixture E=64 r=8 K=2", "mixture", r=8, experts=64, top_k=2)
CANDIDATES = (LORA, FEW, FEW_SMALL, MANY)
# (what, over what, target of the ratio)
TIME_TARGETS = ((FEW, LORA, 1.20), (MANY, FEW_SMALL, 1.30))
MEMORY_TARGET = (FEW, LORA, 1.15)


def training_step(model, batch: int, length: int, **inputs: torch.Tensor) -> Callable[[], object]:
    """A step of AdamW on random tokens: forward, backward, update, gradients cleared."""
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, model.config.vocab_size, (batch, length), generator=generator)
    inputs |= {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}

    def step() -> None:
        model(**inputs).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def measure_time(settings: argparse.Namespace) -> list[dict]:
    """Median seconds of each candidate's step and the ratios that have a target."""
    base = load_base(settings.base, settings.layers)
    steps = {
        c.name: training_step(build(c, base), settings.batch, settings.length) for c in CANDIDATES
    }
    timings = in_turns(steps, settings.rounds)
    rows = [{"what": c.name, "seconds a step": timings.median(c.name)} for c in CANDIDATES]
    for what, over, target in TIME_TARGETS:
        ratio, low, high = timings.ratio(what.name, over.name)
        rows.append(
            {
                "what": f"time: {what.name} / {over.name}",
                "ratio": ratio,
                "min": low,
                "max": high,
                "target": target,
            }
        )
    return rows


def measure_memory(settings: argparse.Namespace) -> list[dict]:
    """Peak resident memory of a process that trains one candidate, for the two candidates of the
    target.
    """
    what, over, target = MEMORY_TARGET
    peaks: dict[str, list[dict]] = {c.name: [] for c in (what, over)}
    for _ in range(settings.memory_rounds):
        for candidate in (what, over):
            peaks[candidate.name].append(_peak_in_process(candidate, settings))
    rows = []
    for key in ("peak MiB", "step's own MiB"):
        values = [min(p[key] for p in peaks[c.name]) for c in (what, over)]
        rows.append(
            {
                "what": f"{key}: {what.name} / {over.name}",
                "ratio": values[0] / values[1],
                "target": target,
            }
        )
        rows += [
            {"what": f"{key}: {c.name}", "MiB": v}
            for c, v in zip((what, over), values, strict=True)
        ]
    return rows


def _peak_in_process(candidate: Candidate, settings: argparse.Namespace) -> dict:
    words = [sys.executable, "-m", "benchmarks.bench_training", "--peak-of", candidate.name]
    for name in ("base", "layers", "batch", "length"):
        words += [f"--{name}", str(getattr(settings, name))]
    result = subprocess.run(words, capture_output=True, text=True, check=False)
    if result.returncode:
        raise RuntimeError(f"measuring {candidate.name} failed:\n{result.stderr}")
    return json.loads(result.stdout.splitlines()[-1])


def print_peak(settings: argparse.Namespace) -> None:
    """Train the candidate named by --peak-of for two steps and print the process's peak memory as
    JSON.
    """
    candidate = next(c for c in CANDIDATES if c.name == settings.peak_of)
    model = build(candidate, load_base(settings.base, settings.layers))
    step = training_step(model, settings.batch, settings.length)
    before = _resident_mib()
    step()
    step()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"peak MiB": peak, "step's own MiB": peak - before}))


def _resident_mib() -> float:
    pages = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1])
    return pages * resource.getpagesize() / 2**20


def main(words: list[str] | None = None) -> None:
    """Measure, print the table, write the JSON."""
    parser = cpu_parser(__doc__, rounds=7, batch=8, length=128, memory_rounds=2)
    parser.add_argument("--peak-of", help=argparse.SUPPRESS)
    settings = parser.parse_args(words)
    if settings.peak_of:
        print_peak(settings)
        return
    rows = measure_time(settings) + measure_memory(settings)
    save_and_print("training_cpu", settings, rows)


if __name__ == "__main__":
    main()
