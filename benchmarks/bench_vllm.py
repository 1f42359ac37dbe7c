"""Inside vLLM on a CPU: tokens a second of a mixture and of vLLM's own LoRA over those of the base,
each in an engine of the same settings, in turns.

python -m benchmarks.bench_vllm          (in the environment of `make test-vllm`)
"""

from __future__ import annotations

import os

# Before vLLM is imported: engines in this process, and one thread, bound to no core.
os.environ |= {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "OMP_NUM_THREADS": "1",
}
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")

import argparse
import functools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from vllm import LLM, SamplingParams, __version__
from vllm.lora.request import LoRARequest

from benchmarks.bench_routers import CLOCKS
from benchmarks.candidates import Candidate, build, load_base
from benchmarks.harness import Timings, cpu_parser, in_turns, save_and_print

BASE = Candidate("base", "base")
MIXTURE = Candidate("mixture E=8 r=16 K=2", "mixture", r=16, experts=8, top_k=2)
LORA = Candidate("vLLM LoRA r=16", "lora", r=16)
CANDIDATES = (BASE, MIXTURE, LORA)
# The mixture's least share of the base's tokens a second.
TARGETS = {"prefill": 0.80, "decode, 8 requests": 0.75, "decode, 1 request": 0.78}
# How far the engine's log-probabilities may be from those of `generate`, fp32.
TOLERANCE = 1e-3


def prompts(count: int, length: int) -> list[list[int]]:
    """Random token ids, none of them special."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(3, 256, (count, length), generator=generator).tolist()


class Engine:
    """One candidate, in an engine of its own.

    Args:
        candidate: what is served.
        model: the same in transformers.
        folder: an empty one, for what is served.
        base_folder: that of the base, for vLLM's LoRA.
        settings: of the command line.
    """

    def __init__(
        self,
        candidate: Candidate,
        model: Any,
        folder: Path,
        base_folder: Path,
        settings: argparse.Namespace,
    ):
        self.model = model
        self.lora = None
        extra: dict[str, Any] = {}
        model.save_pretrained(folder, **({"save_base": True} if candidate is MIXTURE else {}))
        if candidate.kind == "lora":
            self.lora = LoRARequest("lora", 1, str(folder))
            extra = dict(enable_lora=True, max_loras=1, max_lora_rank=candidate.r)
        self.llm = LLM(
            str(base_folder if self.lora else folder),
            dtype="float32",
            enforce_eager=True,
            max_model_len=settings.prompt + settings.new_tokens,
            max_num_seqs=max(settings.batch, 8),
            max_num_batched_tokens=settings.batch * settings.prompt,
            enable_prefix_caching=False,
            skip_tokenizer_init=True,
            **extra,
        )

    def answer(self, rows: list[list[int]], new_tokens: int, **asked: Any) -> list[Any]:
        """Exactly `new_tokens` greedy tokens after each prompt."""
        params = SamplingParams(
            temperature=0, max_tokens=new_tokens, ignore_eos=True, detokenize=False, **asked
        )
        given: Any = [{"prompt_token_ids": row} for row in rows]
        outputs = self.llm.generate(given, params, use_tqdm=False, lora_request=self.lora)
        answers = [output.outputs[0] for output in outputs]
        assert all(len(answer.token_ids) == new_tokens for answer in answers)
        return answers

    @torch.no_grad()
    def check(self) -> list[float]:
        """The log-probabilities of some answers, which must be what transformers says of them."""
        rows = prompts(2, 24)
        found = []
        for row, answer in zip(rows, self.answer(rows, 4, logprobs=0), strict=True):
            tokens = list(answer.token_ids)
            logits = self.model(input_ids=torch.tensor([row + tokens])).logits[0, len(row) - 1 : -1]
            expected = logits.float().log_softmax(-1)[range(4), tokens].tolist()
            own = [step[token].logprob for step, token in zip(answer.logprobs, tokens, strict=True)]
            if max(abs(a - b) for a, b in zip(own, expected, strict=True)) > TOLERANCE:
                raise AssertionError(f"the engine says {own}, transformers {expected}")
            found += own
        return found


def engines(settings: argparse.Namespace, folder: Path) -> dict[str, Engine]:
    """All candidates over one base, checked."""
    base = load_base(settings.base, settings.layers)
    made = {}
    said = {}
    for candidate in CANDIDATES:
        model = build(candidate, base).eval()
        own = folder / candidate.kind
        made[candidate.name] = Engine(candidate, model, own, folder / BASE.kind, settings)
        said[candidate.name] = made[candidate.name].check()
    assert said[BASE.name] not in (said[MIXTURE.name], said[LORA.name])
    return made


def shares(what: str, tokens: int, timings: Timings, target: float) -> list[dict[str, Any]]:
    """A row for each candidate: tokens a second, and their share of the base's."""
    rows = []
    for candidate in CANDIDATES:
        # Seconds of the base over its own are its share of the base's tokens a second.
        share, low, high = timings.ratio(BASE.name, candidate.name)
        row = {"what": what, "candidate": candidate.name}
        row |= {"tokens/s": tokens / timings.median(candidate.name)}
        row |= {"share of base": share, "min": low, "max": high}
        rows.append({**row, "target": target} if candidate is MIXTURE else row)
    return rows


def measure(settings: argparse.Namespace, made: dict[str, Engine]) -> list[dict[str, Any]]:
    """Prefill, and decoding at two sizes of the batch; of decoding, the prompts' time is measured
    and taken off.
    """
    clock: Callable[[], float] = CLOCKS[settings.clock]
    rows = prompts(settings.batch, settings.prompt)
    calls: dict[str, Callable[[], object]] = {
        name: functools.partial(engine.answer, rows, 1) for name, engine in made.items()
    }
    prefill = in_turns(calls, settings.rounds, clock=clock)
    tokens = settings.batch * settings.prompt
    found = shares("prefill", tokens, prefill, TARGETS["prefill"])
    for what, batch in (("decode, 8 requests", 8), ("decode, 1 request", 1)):
        rows = prompts(batch, 16)
        calls = {}
        for name, engine in made.items():
            calls[name] = functools.partial(engine.answer, rows, settings.new_tokens)
            calls[f"{name}, prompt"] = functools.partial(engine.answer, rows, 1)
        taken = in_turns(calls, settings.rounds, clock=clock).seconds
        pairs = {n: zip(taken[n], taken[f"{n}, prompt"], strict=True) for n in made}
        decode = Timings({n: [whole - prompt for whole, prompt in pairs[n]] for n in made})
        found += shares(what, batch * (settings.new_tokens - 1), decode, TARGETS[what])
    return found


def main(words: list[str] | None = None) -> None:
    """Measure, print the table, write the JSON."""
    parser = cpu_parser(__doc__, rounds=7, batch=16, prompt=128, new_tokens=64)
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="cpu on a busy machine")
    settings = parser.parse_args(words)
    settings.vllm = __version__
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(settings, engines(settings, Path(folder)))
    save_and_print("vllm_cpu", settings, rows)


if __name__ == "__main__":
    main()
