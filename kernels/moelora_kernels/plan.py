"""The plan: one routing turned into the index arrays that the kernels read."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from .dispatch import PATHS, Shape, choose_backend, choose_path


@dataclass(frozen=True)
class TopK:
    """A top-k router that the kernels run themselves: the softmax of x Wᵀ, its K largest.

    weight [C, d] fp32: C = E, or E + 1 with null_expert, whose last choice is no expert and adds
    nothing. selection_bias [C] or None shifts which are chosen, never their weights
    (arXiv:2408.15664). norm: the weights are divided by their sum. input_norm: x / √mean(x²) is
    routed.
    """

    weight: Tensor
    selection_bias: Tensor | None = None
    norm: bool = True
    null_expert: bool = False
    input_norm: bool = False

    @property
    def num_experts(self) -> int:
        """E."""
        return self.weight.shape[0] - int(self.null_expert)


@dataclass(frozen=True)
class Plan:
    """A routing in the form of one path; built once, shared by all linears under one router.

    expert_ids [rows, K] int64, -1 = no expert in this slot.
    weights [rows, K], fp32 or fp64, differentiable; 0 in an empty slot.
    slot_experts [rows, K]: expert_ids with 0 in place of -1.
    distinct: no slot is empty and no row names an expert twice.
    backend: the one that runs it, if none is named. tiles: the tuned table of its kernels, by name.
    router: of the decode path alone. Such a plan holds no routing: its kernels route each x that
    they shrink, and the h of that x carries its own logits. Sites that share the plan are thus
    routed each by its own x; expert_ids and weights are those of the last expand.
    kept: the plan serves many calls of the same sites, as those of a request that is generated;
    then what it derives from factors is kept as well.
    memo: what a backend derives from the plan without gradients and wants to keep; `replace` begins
    a new one.
    """

    path: str
    num_experts: int
    rows: int
    tokens_per_row: int
    expert_ids: Tensor
    weights: Tensor
    slot_experts: Tensor
    distinct: bool = False
    backend: str = "eager"
    tiles: str = ""
    router: TopK | None = None
    kept: bool = False
    memo: dict[Any, Any] = field(default_factory=dict, init=False, repr=False, compare=False)
    # Not functools.cached_property, whose lock torch.compile cannot trace.
    _derived: dict[str, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def num_tokens(self) -> int:
        """T = rows * tokens_per_row."""
        return self.rows * self.tokens_per_row

    @property
    def num_slots(self) -> int:
        """K, the experts that a row may choose."""
        return self.expert_ids.shape[1]

    @property
    def gate(self) -> Tensor:
        """[rows, E], differentiable: Σ_k weights[:, k] · [expert_ids[:, k] = e], slot after slot.

        A single scatter would add an expert's duplicates by atomics on a GPU, in no fixed order.
        """
        if "gate" not in self._derived:
            self._derived["gate"] = self._gate()
        return self._derived["gate"]

    @property
    def sorted_slots(self) -> tuple[Tensor, Tensor, Tensor]:
        """The T * K slots stably sorted by expert, their experts, each expert's first [E + 1]."""
        if "sorted_slots" not in self._derived:
            self._derived["sorted_slots"] = self._sorted_slots()
        return self._derived["sorted_slots"]

    def _gate(self) -> Tensor:
        gate = self.weights.new_zeros(self.rows, self.num_experts)
        if self.distinct:
            return gate.scatter(1, self.slot_experts, self.weights)
        for slot in range(self.num_slots):
            column = slice(slot, slot + 1)
            gate = gate.scatter_add(1, self.slot_experts[:, column], self.weights[:, column])
        return gate

    def _sorted_slots(self) -> tuple[Tensor, Tensor, Tensor]:
        ids = self.slot_experts
        if self.tokens_per_row != 1:
            ids = ids.repeat_interleave(self.tokens_per_row, dim=0)
        experts, order = ids.view(-1).sort(stable=True)
        bounds = torch.arange(self.num_experts + 1, device=ids.device)
        return order, experts, torch.searchsorted(experts, bounds)


def build_plan(
    expert_ids: Tensor,
    expert_weights: Tensor,
    num_experts: int,
    *,
    total_rank: int,
    tokens_per_row: int = 1,
    path: str | None = None,
    validate: bool = False,
    complete: bool = False,
    backend: str | None = None,
    dtype: torch.dtype = torch.float32,
    tiles: str = "",
) -> Plan:
    """Turn a routing into a Plan, without waiting for the device.

    An expert that a row names twice counts with the sum of its weights.

    Args:
        expert_ids: [rows, K] int64; -1 is an empty slot.
        expert_weights: [rows, K] fp32 or fp64; they take gradients through the plan.
        num_experts: E.
        total_rank: The largest R of the linears that share the plan.
        tokens_per_row: T / rows: 1, or the length of sequences that are routed as a whole.
        path: A name of `PATHS`; None lets the table of `dispatch` choose, see `explain`.
        validate: Whether to look for ids out of range; a CUDA device asserts it in its own time.
        complete: No slot is empty and no row names an expert twice, as with a top-k; then neither
            is looked for.
        backend: A name of `BACKENDS`; None lets the table choose.
        dtype: Of the activations, for the table.
        tiles: A device's tuned tiles for the Triton backend, by name or path; "" are the defaults.

    Raises:
        TypeError: for a wrong dtype.
        ValueError: for wrong shapes and an unknown path, and with validate for an id out of range.
    """
    _check_routing(expert_ids, expert_weights, num_experts, tokens_per_row)
    rows, num_slots = expert_ids.shape
    choose = _choose.__wrapped__ if torch.compiler.is_compiling() else _choose
    device = expert_ids.device.type
    sizes = (rows, tokens_per_row, num_experts, num_slots, total_rank)
    backend, path = choose(backend, path, *sizes, dtype, device)
    if validate:
        _check_ids(expert_ids, num_experts)
    # One choice may be expanded to all rows, and kernels read them one after another.
    expert_ids = expert_ids.contiguous()
    slot_experts = expert_ids
    weights = expert_weights
    if not complete:
        empty = expert_ids < 0
        slot_experts = expert_ids.masked_fill(empty, 0)
        weights = expert_weights.masked_fill(empty, 0.0)
    routing = (expert_ids, weights, slot_experts, complete)
    return Plan(path, num_experts, rows, tokens_per_row, *routing, backend, tiles)


def build_decode_plan(
    router: TopK, rows: int, num_slots: int, *, backend: str = "triton", tiles: str = ""
) -> Plan:
    """The plan of tokens that the kernels route while they expand: path "decode", no gradients.

    No φ may act between the halves. Every x that is shrunk with the plan is routed by itself; the
    plan's expert_ids and weights [rows, K] hold the routing of the last expand.

    Args:
        router: The top-k router, its weight [C, d] fp32, of at most 64 choices.
        rows: T, at most 64.
        num_slots: K, at most C.
        backend: A name of `BACKENDS` that has the path.
        tiles: As in `build_plan`.

    Raises:
        TypeError: for a router that is not an fp32 matrix.
        ValueError: for more slots than choices.
    """
    check_router(router, num_slots)
    ids = router.weight.new_empty((rows, num_slots), dtype=torch.int64)
    weights = router.weight.new_empty((rows, num_slots))
    distinct = not router.null_expert
    routing = (ids, weights, ids, distinct)
    return Plan("decode", router.num_experts, rows, 1, *routing, backend, tiles, router)


def check_router(router: TopK, num_slots: int) -> None:
    """Raise for a router that is not an fp32 matrix, and for more slots than it has choices."""
    if router.weight.dtype != torch.float32 or router.weight.dim() != 2:
        raise TypeError(
            f"router.weight is {router.weight.dtype} {tuple(router.weight.shape)}, expected"
            " torch.float32 [E, d]: pass router.weight.float()"
        )
    if not 1 <= num_slots <= len(router.weight):
        raise ValueError(
            f"num_slots={num_slots}, expected 1 to the router's {len(router.weight)} experts"
        )


@lru_cache(maxsize=1024)
def _choose(backend: str | None, path: str | None, *sizes: Any) -> tuple[str, str]:
    """The backend and path named, or the table's for a `Shape` of these sizes."""
    shape = Shape(*sizes)
    backend = backend or choose_backend(shape)
    if path is None:
        path = choose_path(backend, shape).path
    elif path not in PATHS:
        raise ValueError(f"path={path!r} is unknown: choose one of {', '.join(PATHS)}, or None")
    return backend, path


def _check_routing(ids: Tensor, weights: Tensor, num_experts: int, tokens_per_row: int) -> None:
    """Raise for a routing of the wrong dtype, shape or device; looks at no value."""
    if ids.dtype != torch.int64:
        raise TypeError(f"expert_ids is {ids.dtype}, expected torch.int64: pass expert_ids.long()")
    if weights.dtype not in (torch.float32, torch.float64):
        raise TypeError(
            f"expert_weights is {weights.dtype}, expected torch.float32 (torch.float64 for checks):"
            " pass expert_weights.float()"
        )
    if ids.dim() != 2 or ids.shape != weights.shape:
        raise ValueError(
            f"expert_ids is {tuple(ids.shape)} and expert_weights {tuple(weights.shape)}, expected"
            " [rows, K] for both: one row a token, or one a sequence with tokens_per_row"
        )
    if ids.device != weights.device:
        raise ValueError(
            f"expert_ids is on {ids.device} and expert_weights on {weights.device}, expected one"
            " device: move one of them"
        )
    if num_experts < 1 or tokens_per_row < 0:
        raise ValueError(
            f"num_experts={num_experts} and tokens_per_row={tokens_per_row}, expected at least"
            " 1 and 0: pass the number of experts and the length of a sequence"
        )


def _check_ids(ids: Tensor, num_experts: int) -> None:
    """Raise for an id that names no expert; a GPU raises later, so that nobody waits for it."""
    if ids.is_cuda:
        message = f"expert_ids names an expert that is not one of -1 to {num_experts - 1}"
        torch.ops.aten._assert_async.msg(((ids >= -1) & (ids < num_experts)).all(), message)
        return
    low, high = (int(ids.min()), int(ids.max())) if ids.numel() else (-1, -1)
    if low < -1 or high >= num_experts:
        raise ValueError(
            f"expert_ids has values in {low}..{high}, expected -1 (no expert) to {num_experts - 1}:"
            " check the router's number of experts"
        )
