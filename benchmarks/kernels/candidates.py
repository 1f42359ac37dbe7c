"""What the kernel benchmark compares: what a user would otherwise run, and every path of every
backend of ours.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache

import torch
from moelora_kernels import BACKENDS, PATHS, build_plan, lora_mixture
from torch import Tensor
from torch.nn.functional import grouped_mm, linear, pad

from benchmarks.kernels.cases import Case
from benchmarks.kernels.names import (
    EINSUM,
    FROZEN,
    GROUPED,
    LOOP,
    LORA,
    LORA_16,
    PAIRS,
    PEFT_LOOP,
    ours,
)

SCALING = 2.0


@dataclass(frozen=True)
class Inputs:
    """The tensors of one case; every trained one is a leaf, the base's weight is frozen.

    x [T, d_in], base [d_out, d_in], A [R, d_in], B [R, d_out], ids and weights [rows, K], dy [T,
    d_out];
    fp32: A and B with the same values in fp32, as a model keeps them.
    lora: the factors of a single LoRA of rank K·r, lora_16 of rank 16.
    given: what stands in for the base's output where the mixture is measured alone; None runs the
    base.
    """

    case: Case
    x: Tensor
    base: Tensor
    A: Tensor
    B: Tensor
    ids: Tensor
    weights: Tensor
    dy: Tensor
    fp32: tuple[Tensor, Tensor]
    lora: tuple[Tensor, Tensor]
    lora_16: tuple[Tensor, Tensor]
    given: Tensor | None = None

    def alone(self) -> Inputs:
        """The same without the base."""
        return replace(self, given=torch.zeros_like(self.dy))

    def base_output(self) -> Tensor:
        """base(x), or what is given in its place."""
        return linear(self.x, self.base) if self.given is None else self.given

    def writable(self, y: Tensor) -> Tensor:
        """y if the base has just made it, else a copy."""
        return y if self.given is None else y.clone()

    def by_expert(self, factor: Tensor) -> Tensor:
        """A or B as [E, r, d]."""
        return factor.view(self.case.experts, self.case.rank, -1)

    def routing(self) -> tuple[Tensor, Tensor]:
        """ids and weights of each token, [T, K]."""
        if self.case.tokens_per_row == 1:
            return self.ids, self.weights
        rows = (self.case.tokens_per_row, 0)
        return self.ids.repeat_interleave(*rows), self.weights.repeat_interleave(*rows)


@dataclass(frozen=True)
class Candidate:
    """One row. add(inputs, y) returns y with the adapter's part added, and may write into
    `inputs.writable(y)`.

    kind: base, lora or mixture. own_bytes: its largest intermediates, forward and backward, in
    elements.
    captured: whether a CUDA graph can hold it. backend, path and fp32 (factors): ours only.
    """

    name: str
    kind: str
    add: Callable[[Inputs, Tensor], Tensor]
    trained: Callable[[Inputs], tuple[Tensor, ...]] = lambda i: (i.x, i.A, i.B, i.weights)
    own_elements: Callable[[Case], int] = lambda case: 0
    captured: bool = True
    backend: str | None = None
    path: str | None = None
    fp32: bool = False

    def run(self, inputs: Inputs) -> Tensor:
        """base(x) and the adapter's part."""
        return self.add(inputs, inputs.base_output())

    def path_taken(self, inputs: Inputs) -> str | None:
        """The path that ours takes here."""
        return _plan(self, inputs).path if self.backend else None

    def why_not(self, inputs: Inputs, free_bytes: float) -> str | None:
        """Why it cannot run here, or None."""
        needed = self.own_elements(inputs.case) * inputs.x.element_size()
        if needed > free_bytes:
            return f"needs about {needed / 2**30:.1f} GiB, {free_bytes / 2**30:.1f} are free"
        if self.fp32 and inputs.x.dtype.itemsize > 2:
            return "its factors are fp32 without it"
        return refusal(self.backend, inputs.x.device, inputs.x.dtype) if self.backend else None


@cache
def refusal(backend: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """What our backend says that it cannot run on this device and dtype, or None: it is asked with
    one token.
    """
    x = torch.zeros(1, 16, device=device, dtype=dtype)
    factor = torch.zeros(16, 16, device=device, dtype=dtype)
    ids = torch.zeros(1, 1, device=device, dtype=torch.int64)
    weights = torch.ones(1, 1, device=device)
    try:
        lora_mixture(x, factor, factor, ids, weights, (0, 16), (SCALING,), backend=backend)
    except ValueError as error:
        return str(error)
    return None


def make_inputs(case: Case, device: torch.device, dtype: torch.dtype, seed: int = 0) -> Inputs:
    """Random tensors, of such sizes that base and mixture weigh alike in y; every token's experts
    differ.
    """
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int, std: float = 1.0, leaf: bool = True) -> Tensor:
        values = torch.randn(shape, generator=generator, device=device) * std
        return values.to(dtype).requires_grad_(leaf)

    def factors(rank: int, terms: int) -> tuple[Tensor, Tensor]:
        return normal(rank, case.d_in, std=case.d_in**-0.5), normal(
            rank, case.d_out, std=terms**-0.5
        )

    rows = case.tokens // case.tokens_per_row
    logits = torch.randn(rows, case.experts, generator=generator, device=device)
    chosen, ids = logits.topk(case.top_k)
    A, B = factors(case.experts * case.rank, case.rank)
    return Inputs(
        case=case,
        x=normal(case.tokens, case.d_in),
        base=normal(case.d_out, case.d_in, std=case.d_in**-0.5, leaf=False),
        A=A,
        B=B,
        ids=ids,
        weights=chosen.softmax(1).requires_grad_(),
        dy=normal(case.tokens, case.d_out, leaf=False),
        fp32=(_fp32_leaf(A), _fp32_leaf(B)),
        lora=factors(case.top_k * case.rank, case.top_k * case.rank),
        lora_16=factors(16, 16),
    )


def _fp32_leaf(factor: Tensor) -> Tensor:
    return factor.detach().float().requires_grad_()


def candidates() -> list[Candidate]:
    """All of them; ours for each backend but the specification: the table's choice, then every path
    by name.
    """
    chosen = [
        Candidate(FROZEN, "base", lambda inputs, y: y, lambda i: (i.x,)),
        Candidate(LORA, "lora", _lora, lambda i: (i.x, *i.lora)),
        Candidate(LORA_16, "lora", _lora_addmm, lambda i: (i.x, *i.lora_16)),
        Candidate(
            PEFT_LOOP,
            "mixture",
            _peft_loop,
            own_elements=lambda c: c.experts * c.tokens * (c.d_in + c.d_out),
        ),
        Candidate(LOOP, "mixture", _loop_over_experts, captured=False),
        Candidate(
            EINSUM,
            "mixture",
            _dense_einsum,
            own_elements=lambda c: 4 * c.tokens * c.experts * c.rank,
        ),
        Candidate(
            GROUPED, "mixture", _grouped, own_elements=lambda c: 2 * _slots(c) * (c.d_in + c.d_out)
        ),
        Candidate(
            PAIRS, "mixture", _pair_rows, own_elements=lambda c: 4 * _slots(c) * (c.d_in + c.d_out)
        ),
    ]
    for backend in BACKENDS:
        if backend != "reference":
            chosen += [_ours(backend, path) for path in (None, *PATHS)]
            chosen += [_ours(backend, path, fp32=True) for path in (None, *PATHS)]
    return chosen


def on_a_gpu() -> list[Candidate]:
    """Those that are worth a lent GPU's time: eager only on the path that is fast there."""
    chosen = [c for c in candidates() if c.backend != "eager" or c.path == "dense"]
    return [c for c in chosen if not (c.backend == "eager" and c.fp32)]


def _ours(backend: str, path: str | None, fp32: bool = False) -> Candidate:
    def factors(inputs: Inputs) -> tuple[Tensor, Tensor]:
        return inputs.fp32 if fp32 else (inputs.A, inputs.B)

    def add(inputs: Inputs, y: Tensor) -> Tensor:
        case = inputs.case
        offsets = tuple(range(0, case.experts * case.rank + 1, case.rank))
        routing = (inputs.ids, inputs.weights)
        return lora_mixture(
            inputs.x,
            *factors(inputs),
            *routing,
            offsets,
            (SCALING,) * case.experts,
            y,
            tokens_per_row=case.tokens_per_row,
            path=path,
            backend=backend,
        )

    def own_elements(case: Case) -> int:
        # eager's sequence path gathers a row's factors, and in the backward pass makes their
        # gradients.
        rows = case.tokens // case.tokens_per_row
        gathered = rows * case.top_k * case.rank * (case.d_in + case.d_out)
        return 2 * gathered if (backend, path) == ("eager", "sequence") else 0

    return Candidate(
        ours(backend, path, fp32),
        "mixture",
        add,
        trained=lambda i: (i.x, *factors(i), i.weights),
        own_elements=own_elements,
        backend=backend,
        path=path,
        fp32=fp32,
    )


def _plan(candidate: Candidate, inputs: Inputs):
    case = inputs.case
    return build_plan(
        inputs.ids,
        inputs.weights,
        case.experts,
        total_rank=case.experts * case.rank,
        tokens_per_row=case.tokens_per_row,
        path=candidate.path,
        backend=candidate.backend,
        dtype=inputs.x.dtype,
    )


def _slots(case: Case) -> int:
    return case.tokens * case.top_k


def _lora(inputs: Inputs, y: Tensor) -> Tensor:
    """PEFT's way: one LoRA of rank K·r, the same multiply-adds as K experts of rank r."""
    A, B = inputs.lora
    return y + linear(linear(inputs.x, A), B.T) * SCALING


def _lora_addmm(inputs: Inputs, y: Tensor) -> Tensor:
    """The fastest single LoRA in plain PyTorch: scaled and added in the second product."""
    A, B = inputs.lora_16
    h = linear(inputs.x, A)
    if inputs.given is None:
        return y.addmm_(h, B, alpha=SCALING)
    return torch.addmm(y, h, B, alpha=SCALING)


def _peft_loop(inputs: Inputs, y: Tensor) -> Tensor:
    """Each expert on all tokens, whose input carries the weight, 0 where it was not chosen: PEFT's
    X-LoRA layer.
    """
    ids, weights = inputs.routing()
    gate = weights.new_zeros(len(ids), inputs.case.experts).scatter(1, ids, weights).to(y.dtype)
    y = inputs.writable(y)
    factors = zip(
        inputs.by_expert(inputs.A).unbind(), inputs.by_expert(inputs.B).unbind(), strict=True
    )
    for expert, (A, B) in enumerate(factors):
        y += linear(linear(inputs.x * gate[:, expert, None], A), B.T) * SCALING
    return y


def _loop_over_experts(inputs: Inputs, y: Tensor) -> Tensor:
    """Each expert in turn on its own tokens alone, as mixture blocks in plain PyTorch do it: the
    best of loops.
    """
    ids, weights = inputs.routing()
    y = inputs.writable(y)
    factors = zip(
        inputs.by_expert(inputs.A).unbind(), inputs.by_expert(inputs.B).unbind(), strict=True
    )
    for expert, (A, B) in enumerate(factors):
        tokens, slots = (ids == expert).nonzero(as_tuple=True)
        weight = weights[tokens, slots, None] * SCALING
        h = inputs.x.index_select(0, tokens) @ A.T
        y.index_add_(0, tokens, (h * weight).to(h.dtype) @ B)
    return y


def _dense_einsum(inputs: Inputs, y: Tensor) -> Tensor:
    """All experts for all tokens, [T, E, r], those not chosen times 0."""
    ids, weights = inputs.routing()
    gate = weights.new_zeros(len(ids), inputs.case.experts).scatter(1, ids, weights) * SCALING
    h = torch.einsum("td,erd->ter", inputs.x, inputs.by_expert(inputs.A))
    return y + torch.einsum(
        "ter,erd->td", (h * gate[:, :, None]).to(h.dtype), inputs.by_expert(inputs.B)
    )


def _grouped(inputs: Inputs, y: Tensor) -> Tensor:
    """Two grouped products over slots sorted by expert, weighted in rank space, added token by
    token.
    """
    order, tokens, ends, weights = _sorted_slots(inputs)
    h = grouped_mm(inputs.x[tokens], _padded(inputs, inputs.A).mT, offs=ends)
    h = (h * (weights.flatten()[order, None] * SCALING)).to(h.dtype)
    return inputs.writable(y).index_add_(
        0, tokens, grouped_mm(h, _padded(inputs, inputs.B), offs=ends)
    )


def _pair_rows(inputs: Inputs, y: Tensor) -> Tensor:
    """ScatterMoE's way: a row of d_out for each pair of token and slot, kept for the weights'
    gradient, then summed.
    """
    order, tokens, ends, weights = _sorted_slots(inputs)
    h = grouped_mm(inputs.x[tokens], _padded(inputs, inputs.A).mT, offs=ends)
    rows = grouped_mm(h, _padded(inputs, inputs.B), offs=ends)
    pairs = rows[order.argsort()].view(len(y), -1, y.shape[1])
    return y + torch.bmm((weights * SCALING).to(pairs.dtype)[:, None], pairs).squeeze(1)


def _sorted_slots(inputs: Inputs) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The slots by expert, their tokens, where each expert's end, and the tokens' weights."""
    ids, weights = inputs.routing()
    experts, order = ids.flatten().sort(stable=True)
    ends = torch.searchsorted(
        experts, torch.arange(inputs.case.experts, device=ids.device), right=True
    )
    return order, order // ids.shape[1], ends.to(torch.int32), weights


def _padded(inputs: Inputs, factor: Tensor) -> Tensor:
    """The factor as [E, r, d] with r filled up to a multiple of 8: grouped_mm wants strides of 16
    bytes.
    """
    blocks = inputs.by_expert(factor)
    return pad(blocks, (0, 0, 0, -inputs.case.rank % 8)) if inputs.case.rank % 8 else blocks
