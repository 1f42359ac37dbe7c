"""Hundreds of experts on CPU: making, running, saving and loading them, and keeping them in the
checkpoint's file with a few resident. Each case is a process of its own.

python -m benchmarks.bench_many_experts
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.candidates import load_base
from benchmarks.harness import cpu_parser, save_and_print
from moelora import MoeLoraConfig, MoeLoraForCausalLM

# By the number of experts, the seconds in which a checkpoint is to be loaded.
LOAD_TARGETS = {1024: 10.0}


@dataclass(frozen=True)
class Case:
    """So many experts of rank `r`, `top_k` a token, of which `resident` are kept at hand later."""

    experts: int
    r: int = 8
    top_k: int = 2
    resident: int = 64


CASES = (Case(256), Case(1024))


class Stopwatch:
    """Rows of seconds: on the wall and, for a machine that others use too, of this process.

    Args:
        row: that the figures are put into, by what was measured.
    """

    def __init__(self, row: dict[str, Any]):
        self.row = row

    def __call__(self, what: str, call: Callable[[], Any], rounds: int = 1) -> Any:
        """The least seconds of a call that is made `rounds` times; returns what it gave last.

        Args:
            what: what it is called in the row.
            call: what is measured.
            rounds: how often.
        """
        taken = []
        result = None
        for _ in range(rounds):
            # Models are circles of references: without this several would be in memory.
            result = None
            gc.collect()
            start = (time.perf_counter(), time.process_time())
            result = call()
            taken.append((time.perf_counter() - start[0], time.process_time() - start[1]))
        self.row[f"{what} s"], self.row[f"{what} cpu s"] = map(min, zip(*taken, strict=True))
        print(f"{what}: {self.row[f'{what} s']:.2f} s", file=sys.stderr, flush=True)
        return result


def drawn(base: Any, case: Case) -> Any:
    """A new mixture in a copy of `base`, with B away from zero."""
    config = MoeLoraConfig(
        num_experts=case.experts,
        r=case.r,
        lora_alpha=2 * case.r,
        num_experts_per_tok=case.top_k,
        target_modules="all-linear",
    )
    return MoeLoraForCausalLM.from_base(base, config)


@torch.no_grad()
def activate(model: Any) -> None:
    """Give every B values."""
    for factor in model.moelora.factors():
        if factor.layout.scaling is not None:
            factor.weight.normal_(std=0.02)


def measure(case: Case, settings: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """What the case took, after a check that few resident experts give what all of them give."""
    torch.manual_seed(0)
    # Of what may be repeated the least is taken.
    rounds = settings.rounds
    base = load_base(settings.base, settings.layers)
    ids = torch.randint(0, base.config.vocab_size, (settings.batch, settings.length))
    row: dict[str, Any] = {"experts": case.experts}
    timed = Stopwatch(row)
    fresh = copy.deepcopy(base)
    model: Any = timed("construct", lambda: drawn(fresh, case))
    row["parameters"] = sum(p.numel() for own in model.moelora.factors() for p in own.parameters())
    activate(model)
    model.eval()

    @torch.no_grad()
    def forward() -> torch.Tensor:
        return model(ids, attention_mask=torch.ones_like(ids)).logits

    expected = timed("forward", forward, rounds)
    model.train()

    def loss() -> torch.Tensor:
        model.zero_grad()
        return model(ids, labels=ids).loss

    value = timed("training forward", loss, rounds)
    timed("backward", value.backward)
    model.zero_grad()
    model.eval()
    timed("save", lambda: model.save_pretrained(folder))
    row["file MB"] = (folder / "model.safetensors").stat().st_size / 1e6
    model = None
    bases = [copy.deepcopy(base) for _ in range(rounds)]
    load = MoeLoraForCausalLM.from_pretrained
    model = timed("load", lambda: load(folder, base=bases.pop()), rounds)
    if case.experts in LOAD_TARGETS:
        row["target: load s"] = LOAD_TARGETS[case.experts]
    assert torch.equal(forward(), expected)
    model = None
    row |= offloaded(case, base, folder, ids, expected, rounds)
    row["peak MB"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    return row


@torch.no_grad()
def offloaded(
    case: Case, base: Any, folder: Path, ids: torch.Tensor, expected: torch.Tensor, rounds: int
) -> dict[str, Any]:
    """The same checkpoint with a few experts resident, the others in its file."""
    row: dict[str, Any] = {}
    timed = Stopwatch(row)
    load = MoeLoraForCausalLM.from_pretrained
    bases = [copy.deepcopy(base) for _ in range(rounds)]
    keywords: dict[str, Any] = {"resident_experts": case.resident}
    model = timed("load offloaded", lambda: load(folder, base=bases.pop(), **keywords), rounds)
    found = timed("forward offloaded", lambda: model(ids).logits, rounds)
    error = (found - expected).abs().max() / expected.abs().max()
    assert error < 1e-4, f"offloaded experts give other logits: {error}"
    report = model.expert_cache_report(reset=True)
    row["resident"] = report.resident
    row["resident MB"] = report.bytes_resident / 1e6
    row["moved MB a forward"] = report.total.bytes_moved / 1e6 / rounds
    keywords = {"max_new_tokens": 16, "do_sample": False, "pad_token_id": 0}
    one = timed("16 tokens offloaded", lambda: model.generate(ids[:1], **keywords))
    report = model.expert_cache_report()
    row["hit rate while generating"] = report.hit_rate
    model.onload_experts()
    other = timed("16 tokens", lambda: model.generate(ids[:1], **keywords))
    assert torch.equal(one, other)
    return row


def in_a_process(case: Case, words: list[str]) -> dict[str, Any]:
    """The row of a case, from a process whose memory is its own."""
    command = [sys.executable, "-m", "benchmarks.bench_many_experts", *words]
    command += ["--case", json.dumps(asdict(case))]
    lines = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return json.loads(lines.splitlines()[-1])


def main(words: list[str] | None = None) -> None:
    """Measure, print the table, write the JSON."""
    parser = cpu_parser(__doc__, rounds=2, batch=2, length=128)
    parser.add_argument("--experts", type=int, nargs="*", help="these numbers of experts instead")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    settings = parser.parse_args(words)
    if settings.case:
        with tempfile.TemporaryDirectory() as folder:
            row = measure(Case(**json.loads(settings.case)), settings, Path(folder))
        print(json.dumps(row))
        return
    names = ("base", "layers", "batch", "length", "rounds")
    own = [f"--{name}={getattr(settings, name)}" for name in names]
    cases = [Case(experts) for experts in settings.experts] if settings.experts else CASES
    rows = [in_a_process(case, own) for case in cases]
    save_and_print("many_experts_cpu", settings, rows)


if __name__ == "__main__":
    main()
