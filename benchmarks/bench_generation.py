"""Decoding on CPU with the KV cache: tokens a second of the base, PEFT's LoRA, a mixture, and
PEFT's X-LoRA, in turns.

python -m benchmarks.bench_generation
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch

from benchmarks.candidates import Candidate, build, load_base
from benchmarks.harness import Timings, cpu_parser, in_turns, save_and_print

BASE = Candidate("base", "base")
LORA = Candidate("PEFT LoRA r=32", "lora", r=32)
MIXTURE = Candidate("mixture E=8 r=16 K=2", "mixture", r=16, experts=8, top_k=2)
XLORA = Candidate("PEFT X-LoRA E=8 r=16 K=2", "xlora", r=16, experts=8, top_k=2)
# (batch, the mixture's least share of the base's tokens a second)
TARGETS = {1: 0.75, 8: 0.85}


def decoding(model, batch: int, prompt: int, new_tokens: int) -> Callable[[], object]:
    """Greedy generation of exactly `new_tokens` tokens after random prompts."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, model.config.vocab_size, (batch, prompt), generator=generator)

    def generate() -> None:
        out = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            do_sample=False,
            pad_token_id=0,
        )
        assert out.shape == (batch, prompt + new_tokens)

    return generate


def measure(settings: argparse.Namespace, batch: int) -> list[dict]:
    """Tokens a second and their share of the base's; the prompt's own time is measured and taken
    off.
    """
    base = load_base(settings.base, settings.layers)
    models = {c.name: build(c, base) for c in (BASE, LORA, MIXTURE)}
    candidates = {}
    for name, model in models.items():
        candidates[name] = decoding(model, batch, settings.prompt, settings.new_tokens)
        candidates[f"{name}, prompt"] = decoding(model, batch, settings.prompt, 1)
    timings = in_turns(candidates, settings.rounds)
    decode = Timings(
        {
            n: [
                a - b
                for a, b in zip(timings.seconds[n], timings.seconds[f"{n}, prompt"], strict=True)
            ]
            for n in models
        }
    )
    tokens = batch * (settings.new_tokens - 1)
    rows = []
    for name in models:
        # Seconds of the base over seconds of the candidate: the candidate's share of its tokens a
        # second.
        share, low, high = decode.ratio(BASE.name, name)
        row = {"batch": batch, "what": name, "tokens/s": tokens / decode.median(name)}
        row |= {"share of base": share, "min": low, "max": high}
        rows.append(
            row | ({"target": TARGETS[batch]} if name == MIXTURE.name and batch in TARGETS else {})
        )
    return rows


def measure_xlora(settings: argparse.Namespace, base_rate: float) -> dict:
    """X-LoRA at batch 1: it runs the base twice and whole for every token, so a few tokens are
    enough.
    """
    model = build(XLORA, load_base(settings.base, settings.layers))
    few = max(2, settings.new_tokens // 16)
    timings = in_turns({XLORA.name: decoding(model, 1, settings.prompt, few)}, rounds=2)
    rate = few / timings.median(XLORA.name)
    return {"batch": 1, "what": XLORA.name, "tokens/s": rate, "share of base": rate / base_rate}


def main(words: list[str] | None = None) -> None:
    """Measure, print the table, write the JSON."""
    parser = cpu_parser(__doc__, rounds=7, prompt=64, new_tokens=64)
    parser.add_argument("--no-xlora", action="store_true")
    settings = parser.parse_args(words)
    rows = [row for batch in TARGETS for row in measure(settings, batch)]
    if not settings.no_xlora:
        rows.append(measure_xlora(settings, rows[0]["tokens/s"]))
    save_and_print("generation_cpu", settings, rows)


if __name__ == "__main__":
    main()
