"""What choosing costs for one prompt: the gate, the selector that writes a name, and a forward
pass, in turns.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from peft import PeftModel

from benchmarks.harness import Timings, in_turns
from benchmarks.routing import bases
from benchmarks.routing.mixtures import sequence_gated
from benchmarks.routing.selector import SELECTOR, generate
from benchmarks.routing.settings import Settings
from benchmarks.routing.tasks import drawn
from moelora.training import Texts

ROUTE = "gate: route()"
WRITE = "selector: generate the label"
FORWARD = "base: forward"
GATED = "mixture: forward, gated"
FORCED = "mixture: forward, expert forced"


def run_latency(settings: Settings, seed: int) -> dict[str, Any]:
    """Median milliseconds a prompt at batch 1, and ratios (median, minimum, maximum) taken round by
    round.
    """
    tokenizer = bases.load_tokenizer(settings.base)
    sizes = settings.sizes
    count = sizes.latency_prompts
    rows = [
        row
        for task in settings.tasks
        for row in drawn(task.test, count, seed, f"{task.name}, latency")
    ]
    prompts = [prompt[None] for prompt in Texts.of(rows, tokenizer).prompts()]
    base = bases.load(settings.base)
    mixture = sequence_gated(settings, settings.tasks, seed, tokenizer)
    selector = PeftModel.from_pretrained(
        bases.load(settings.base), str(settings.adapter(seed, SELECTOR))
    ).eval()
    mask = {len(p[0]): torch.ones_like(p) for p in prompts}

    def inputs(prompt: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"input_ids": prompt, "attention_mask": mask[prompt.shape[1]]}

    def forced(prompt: torch.Tensor) -> None:
        with mixture.use_experts(settings.names[0]):
            mixture(**inputs(prompt))

    timings = in_turns(
        {
            ROUTE: over(prompts, lambda p: mixture.route(**inputs(p))),
            WRITE: over(prompts, lambda p: generate(selector, inputs(p), tokenizer)),
            FORWARD: over(prompts, lambda p: base(**inputs(p))),
            GATED: over(prompts, lambda p: mixture(**inputs(p))),
            FORCED: over(prompts, forced),
        },
        sizes.latency_rounds,
    ).divided_by(len(prompts))
    return summary(timings) | {
        "prompts": len(prompts),
        "tokens": sum(p.shape[1] for p in prompts) / len(prompts),
    }


def over(prompts: list[torch.Tensor], call: Callable[[torch.Tensor], object]) -> Callable[[], None]:
    """A candidate that does `call` for each prompt in turn."""

    def run() -> None:
        with torch.no_grad():
            for prompt in prompts:
                call(prompt)

    return run


def summary(timings: Timings) -> dict[str, Any]:
    """The figures of `run_latency` from its timings."""
    pairs = {
        "gate over a forward of the base": (ROUTE, FORWARD),
        "selector over the gate": (WRITE, ROUTE),
        "gated forward over a forced one": (GATED, FORCED),
        "gated forward over a forward of the base": (GATED, FORWARD),
    }
    return {
        "milliseconds": {name: 1000 * timings.median(name) for name in timings.seconds},
        "ratios": {name: timings.ratio(*pair) for name, pair in pairs.items()},
    }
