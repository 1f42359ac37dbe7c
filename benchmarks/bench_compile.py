"""torch.compile with inductor on CPU: a training step, evaluation and decoding with a static cache,
compiled over eager in turns, for the base, PEFT's LoRA and a mixture; and graph breaks in
`generate`.

python -m benchmarks.bench_compile
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from torch._dynamo.utils import counters
from transformers import StaticCache

from benchmarks.bench_generation import BASE, LORA, MIXTURE
from benchmarks.candidates import build, load_base
from benchmarks.harness import cpu_parser, in_turns, save_and_print

# Compiled over eager seconds: what compiling is for.
TARGET = 1.0


def training_step(model: Any, call: Callable[..., Any], ids: torch.Tensor) -> Callable[[], None]:
    """Forward and backward of `call`, which is the model or what torch.compile made of it."""

    def step() -> None:
        model.train()
        call(input_ids=ids, labels=ids).loss.backward()
        model.zero_grad()

    return step


def evaluation(model: Any, call: Callable[..., Any], ids: torch.Tensor) -> Callable[[], None]:
    """A forward pass alone."""

    @torch.no_grad()
    def evaluate() -> None:
        model.eval()
        call(input_ids=ids)

    return evaluate


def decoding(model: Any, call: Callable[..., Any], ids: torch.Tensor) -> Callable[[], None]:
    """16 tokens of the first row, one at a time, in a static cache that is empty at first."""
    cache = StaticCache(config=model.config, max_cache_len=16)

    @torch.no_grad()
    def decode() -> None:
        model.eval()
        cache.reset()
        for position in range(16):
            call(
                input_ids=ids[:1, position : position + 1],
                past_key_values=cache,
                use_cache=True,
                position_ids=torch.tensor([[position]]),
            )

    return decode


CASES = {"training step": training_step, "evaluation": evaluation, "16 tokens": decoding}


def measure(case: str, settings: argparse.Namespace) -> list[dict[str, Any]]:
    """Milliseconds compiled and eager, and their ratio, of each candidate."""
    base = load_base(settings.base, settings.layers)
    draw = torch.Generator().manual_seed(0)
    shape = (settings.batch, settings.length)
    ids = torch.randint(3, base.config.vocab_size, shape, generator=draw)
    runs: dict[str, Callable[[], object]] = {}
    for candidate in (BASE, LORA, MIXTURE):
        model = build(candidate, base)
        # A class of one module for each: they share no compiled code.
        torch._dynamo.reset()
        runs[f"{candidate.name}, eager"] = CASES[case](model, model, ids)
        fast = torch.compile(model, backend=settings.backend, dynamic=False)
        runs[f"{candidate.name}, compiled"] = CASES[case](model, fast, ids)
        runs[f"{candidate.name}, compiled"]()
    timings = in_turns(runs, settings.rounds)
    rows = []
    for candidate in (BASE, LORA, MIXTURE):
        eager = f"{candidate.name}, eager"
        compiled = f"{candidate.name}, compiled"
        ratio, low, high = timings.ratio(compiled, eager)
        row = {"case": case, "what": candidate.name, "eager ms": 1e3 * timings.median(eager)}
        row |= {"compiled ms": 1e3 * timings.median(compiled), "compiled / eager": ratio}
        row |= {"min": low, "max": high}
        rows.append(row | ({"target": TARGET} if candidate is MIXTURE else {}))
    return rows


def breaks_in_generate(settings: argparse.Namespace) -> list[dict[str, Any]]:
    """How often the graph breaks where `generate` with a static cache calls a compiled forward."""
    base = load_base(settings.base, 1)
    rows = []
    for candidate in (BASE, MIXTURE):
        torch._dynamo.reset()
        counters.clear()
        model: Any = build(candidate, base)
        model.forward = torch.compile(model.forward, backend="eager")
        ids = torch.arange(3, 11)[None]
        keywords = {"cache_implementation": "static", "max_new_tokens": 8, "pad_token_id": 0}
        model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, **keywords)
        found = sum(counters["graph_break"].values())
        rows.append({"case": "generate", "what": candidate.name, "graph breaks": found})
    return rows


def main(words: list[str] | None = None) -> None:
    """Measure, print the table, write the JSON."""
    parser = cpu_parser(__doc__, rounds=9, batch=2, length=128)
    parser.add_argument("--backend", default="inductor", help="of torch.compile")
    parser.add_argument("--only", choices=CASES, help="measure one of them")
    settings = parser.parse_args(words)
    rows = breaks_in_generate(settings)
    for case in [settings.only] if settings.only else CASES:
        rows += measure(case, settings)
    save_and_print("compile_cpu", settings, rows)


if __name__ == "__main__":
    main()
