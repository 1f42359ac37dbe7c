"""A decoder layer and a small model as users have them: a training step with router and losses,
decoding in every way, and generation, over the same base with nothing or one LoRA in it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.kernels import cases
from benchmarks.kernels.names import (
    BASE,
    COMPILED,
    EAGER,
    GENERATE,
    GRAPH,
    LAYER,
    MODEL,
    PEFT_LORA,
    STATIC,
    TRAINING_STEP,
    ours,
)
from benchmarks.kernels.run import Row, Run, Unit, failed, spread, times
from benchmarks.kernels.timing import Measured
from moelora import MoeLoraConfig, MoeLoraForCausalLM

# ‖got − wanted‖ / ‖wanted‖ between the backends: in 16 bits a few tokens choose other experts.
TOLERANCES = {torch.float32: 1e-3, torch.float16: 5e-2, torch.bfloat16: 5e-2}
OURS = ours("triton")
OURS_EAGER = ours("eager")
Models = dict[str, Any]
Way = Callable[[], list[Tensor]]


class WrongModel(AssertionError):
    """A way to run a model that does not give what another gives."""


def layer(run: Run) -> Iterator[Unit]:
    """One decoder layer: a training step, and decoding without a compiler."""
    yield from _units(run, LAYER, run.suite.layer, (EAGER, GRAPH))


def model(run: Run) -> Iterator[Unit]:
    """The small model: the same, and generation with a growing cache."""
    yield from _units(run, MODEL, run.suite.model, (EAGER, GRAPH))
    yield f"{MODEL}: {GENERATE}", lambda: generate(run, run.suite.model, GENERATE)


def compiled(run: Run) -> Iterator[Unit]:
    """What torch.compile makes of them: decoding, and generation with a static cache, which
    transformers compiles on a GPU.
    """
    shape = run.suite.model
    yield f"{MODEL}: {STATIC}", lambda: generate(run, shape, STATIC)
    for what, shape in ((LAYER, run.suite.layer), (MODEL, run.suite.model)):
        if what == LAYER or not run.suite.interpreted:
            yield f"{what}: {COMPILED}", lambda w=what, s=shape: forwards(run, w, s, 1, COMPILED)


def _units(run: Run, what: str, shape: cases.Model, ways: tuple[str, ...]) -> Iterator[Unit]:
    yield f"{what}: {TRAINING_STEP}", lambda: training(run, what, shape)
    for tokens in run.suite.decode_tokens:
        for way in ways:
            yield (
                f"{what}: {way} T={tokens}",
                lambda tokens=tokens, way=way: forwards(run, what, shape, tokens, way),
            )


def models_of(run: Run, shape: cases.Model, lora: bool = False) -> Models:
    """The base and the mixture over a copy of it, and a single LoRA over another; by candidate."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    dtype = torch.float32 if run.suite.interpreted else run.suite.dtype
    with torch.device(run.device):
        base = LlamaForCausalLM(config)
    base.to(dtype=dtype).eval().requires_grad_(False)  # type: ignore[reportArgumentType]
    mixture = MoeLoraConfig(
        num_experts=shape.experts,
        num_experts_per_tok=shape.top_k,
        r=shape.rank,
        target_modules="all-linear",
    )
    found: Models = {BASE: base}
    found[OURS] = MoeLoraForCausalLM.from_base(copy.deepcopy(base), mixture)
    if lora:
        rank = shape.top_k * shape.rank
        settings = LoraConfig(r=rank, target_modules="all-linear", task_type="CAUSAL_LM")
        found[PEFT_LORA] = get_peft_model(copy.deepcopy(base), settings)
    with torch.no_grad():
        for candidate in found.values():
            for name, parameter in candidate.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=0.02)
    return found


def calls_of(models: Models, make: Callable[[Any], Way]) -> dict[str, Way]:
    """A call of every model, and one more of the mixture on the eager backend."""
    calls = {name: make(candidate) for name, candidate in models.items()}
    mixture = models[OURS]
    call = calls[OURS]

    def on(backend: str) -> Way:
        def switched() -> list[Tensor]:
            mixture.moelora.backend = backend
            return call()

        return switched

    return {**calls, OURS: on("triton"), OURS_EAGER: on("eager")}


def training(run: Run, what: str, shape: cases.Model) -> Iterator[Row]:
    """Forward and backward pass, to the input of the layers: over the base and over one LoRA."""
    columns = {"case": shape.named(shape.batch * shape.length)}
    models = models_of(run, shape, lora=True)
    dtype = next(models[BASE].parameters()).dtype
    size = (shape.batch, shape.length)
    x = torch.randn(*size, shape.hidden, device=run.device, dtype=dtype).requires_grad_()
    labels = torch.randint(0, shape.vocab, size, device=run.device)

    def make(candidate: Any) -> Way:
        candidate.train()
        trained = [p for p in candidate.parameters() if p.requires_grad]

        def step() -> list[Tensor]:
            candidate.zero_grad(set_to_none=True)
            x.grad = None
            loss = candidate(inputs_embeds=x, labels=labels, use_cache=False).loss
            loss.backward()
            grads = (tensor.grad for tensor in (x, *trained))
            return [loss.detach(), *(grad for grad in grads if grad is not None)]

        return step

    columns["measure"] = f"{what} {TRAINING_STEP}"
    calls = calls_of(models, make)
    yield from _rows(run, columns, calls, _agreeing(run, calls, 1), hidden=True)


def forwards(run: Run, what: str, shape: cases.Model, tokens: int, way: str) -> Iterator[Row]:
    """A token of each of so many sequences, without a cache: eager, in a graph, or compiled."""
    models = models_of(run, shape)
    ids = torch.randint(0, shape.vocab, (tokens, 1), device=run.device)
    breaks: dict[str, int] = {}

    def make(candidate: Any) -> Way:
        @torch.no_grad()
        def forward() -> list[Tensor]:
            return [candidate(input_ids=ids, use_cache=False).logits]

        return forward

    calls = calls_of(models, make)
    failures = _agreeing(run, calls)
    if way == COMPILED:
        del calls[OURS_EAGER]
    ready: dict[str, Way] = {}
    for name, call in calls.items():

        def prepare(name: str = name, call: Way = call) -> None:
            wanted = call()
            again = _compiled(run, call) if way == COMPILED else _graph(run, call, way)
            breaks[name] = sum(torch._dynamo.utils.counters["graph_break"].values())
            _check(again(), wanted)
            ready[name] = again

        if name not in failures and (why := run.attempt(name, prepare)):
            failures[name] = why
    columns = {"case": shape.named(tokens), "measure": f"{what} {way}"}
    for row in _rows(run, columns, ready, failures, hidden=way == GRAPH):
        yield row | ({"graph breaks": breaks.get(row["candidate"])} if way == COMPILED else {})


def generate(run: Run, shape: cases.Model, measure: str) -> Iterator[Row]:
    """Greedy generation by `generate`: tokens a second, prefill and all."""
    models = models_of(run, shape)
    prompt = torch.randint(0, shape.vocab, (1, 8), device=run.device)
    options = {"cache_implementation": "static"} if measure == STATIC else {}
    count = shape.new_tokens

    def make(candidate: Any) -> Way:
        def call() -> list[Tensor]:
            sequence = candidate.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=count,
                min_new_tokens=count,
                do_sample=False,
                **options,
            )
            return [sequence]

        return call

    calls = calls_of(models, make)
    columns = {"case": shape.named(1), "measure": f"{MODEL} {measure}"}
    for row in _rows(run, columns, calls, {}, hidden=False):
        if "microseconds" in row:
            row["tokens/s"] = 1e6 * count / row["microseconds"]
        yield row


def _rows(
    run: Run, columns: Row, calls: dict[str, Way], failures: dict[str, str], hidden: bool
) -> Iterator[Row]:
    """Times of those that did not fail, over the base's and over one LoRA's."""
    timings: Measured = run.timed(
        {name: call for name, call in calls.items() if name not in failures}, hidden=hidden
    )
    for name in timings.seconds:
        row = {**columns, "candidate": name, **times(timings, name)}
        for column, other in (("over frozen base", BASE), ("over one LoRA", PEFT_LORA)):
            if other in timings.seconds:
                row |= spread(column, timings.ratio(name, other))
        yield row
    yield from failed({**failures, **timings.failed}, **columns)


def _agreeing(run: Run, calls: dict[str, Way], calls_before: int = 0) -> dict[str, str]:
    """Why a candidate is not timed: it dies, or the two backends do not give the same."""
    found: dict[str, list[Tensor]] = {}
    failures: dict[str, str] = {}
    for name, call in calls.items():

        def keep(name: str = name, call: Way = call) -> None:
            # The balancing loss of a step takes its fractions from the step before.
            for _ in range(calls_before):
                call()
            found[name] = call()

        if why := run.attempt(name, keep):
            failures[name] = why
    if {OURS, OURS_EAGER} <= found.keys():
        why = run.attempt(OURS, lambda: _check(found[OURS], found[OURS_EAGER]))
        if why:
            failures[OURS] = why
    return failures


def _check(got: list[Tensor], wanted: list[Tensor]) -> None:
    """Raise WrongModel unless the first two agree, and all others taken together."""
    for part in (slice(0, 1), slice(1, 2), slice(2, None)):
        pairs = list(zip(got[part], wanted[part], strict=True))
        missed = sum(float((a.double() - b.double()).square().sum()) for a, b in pairs)
        size = sum(float(b.double().square().sum()) for _, b in pairs)
        if not missed <= TOLERANCES[wanted[0].dtype] ** 2 * size:
            raise WrongModel(f"off by {missed**0.5:.1e} of {size**0.5:.1e} in {part}")


def _graph(run: Run, call: Way, way: str) -> Way:
    return run.captured(call) if way == GRAPH else call  # type: ignore[return-value]


def _compiled(run: Run, call: Way) -> Way:
    """The call under torch.compile; without a GPU there is no graph for it to make."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    if run.is_gpu:
        fast = torch.compile(call, mode="reduce-overhead")
    else:
        fast = torch.compile(call, backend="aot_eager")

    def started() -> list[Tensor]:
        torch.compiler.cudagraph_mark_step_begin()
        return fast()

    for _ in range(3):
        started()
    return started
