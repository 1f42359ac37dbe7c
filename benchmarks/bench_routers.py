"""Training step on CPU with each kind of router, over that with top_k, in turns.

python -m benchmarks.bench_routers
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedModel

from benchmarks.bench_training import training_step
from benchmarks.candidates import load_base
from benchmarks.harness import cpu_parser, in_turns, save_and_print, table
from moelora import ROUTERS, MoeLoraConfig, MoeLoraForCausalLM

REFERENCE = "top_k"
TARGET = 1.10
# Settings under which a router computes more than with its defaults.
DEARER = {"sparsegen": {"predicts_sparsity": True}}
CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}


def candidates() -> dict[str, dict[str, Any]]:
    """The fields of each router's configuration by what it is called here."""
    fields: dict[str, dict[str, Any]] = {name: {"router": name} for name in sorted(ROUTERS)}
    for name, options in DEARER.items():
        fields[f"{name} {options}"] = {"router": name, "router_options": options}
    del fields[REFERENCE]
    return fields


def mixture(base: PreTrainedModel, **fields: Any) -> Any:
    """Eight experts of rank 16 in a copy of `base`, with B away from zero."""
    config = MoeLoraConfig(
        num_experts=8, r=16, lora_alpha=32, target_modules="all-linear", **fields
    )
    torch.manual_seed(1)
    model = MoeLoraForCausalLM.from_base(copy.deepcopy(base), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.02)
    return model


def measure(settings: argparse.Namespace) -> list[dict[str, Any]]:
    """The ratio of each router's step to that of `top_k`, each pair by itself."""
    base = load_base(settings.base, settings.layers)
    reference = training_step(mixture(base), settings.batch, settings.length)
    rows = []
    for name, fields in candidates().items():
        if settings.only and not name.startswith(settings.only):
            continue
        model = mixture(base, **fields)
        router = model.moelora.router_list[0]
        told = {}
        if router.reads == "context":
            told["router_context"] = torch.randn(settings.batch, router.in_features)
        if model.moelora.reads_prompts:
            prompt = torch.arange(settings.length) < settings.length // 2
            told["router_mask"] = prompt.expand(settings.batch, -1)
        step = training_step(model, settings.batch, settings.length, **told)
        steps = {name: step, REFERENCE: reference}
        timings = in_turns(steps, settings.rounds, clock=CLOCKS[settings.clock])
        ratio, low, high = timings.ratio(name, REFERENCE)
        row = {"what": f"{name} / {REFERENCE}", "ratio": ratio, "min": low, "max": high}
        rows.append({**row, "target": TARGET, "seconds a step": timings.median(name)})
        print(table(rows[-1:]).splitlines()[-1], flush=True)
    return rows


def main(words: list[str] | None = None) -> None:
    """Measure, print the table, write the JSON."""
    parser = cpu_parser(__doc__, rounds=9, batch=8, length=128)
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="cpu on a busy machine")
    parser.add_argument("--only", default="", help="the routers whose names begin so")
    settings = parser.parse_args(words)
    rows = measure(settings)
    save_and_print("routers_cpu", settings, rows)


if __name__ == "__main__":
    main()
