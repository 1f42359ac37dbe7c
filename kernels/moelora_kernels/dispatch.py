"""Which backend and which path: one table, the first rule that matches wins."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec

import torch

PATHS = ("dense", "matmul", "grouped", "sequence")
# Those that compute all experts, the ones not chosen with gate 0.
MASKED = ("dense", "matmul")
# What the kernels route by themselves; in a program that expands, so many choices.
DECODE_TOKENS = 64
DECODE_CHOICES = 64
ROUTED_CHOICES = 2048
DECODE_SLOTS = 16  # their loop is unrolled
HAS_TRITON = find_spec("triton") is not None


@dataclass(frozen=True)
class Shape:
    """What the table reads. rows of tokens_per_row tokens; E = num_experts, K = num_slots, R =
    total_rank.
    """

    rows: int
    tokens_per_row: int
    num_experts: int
    num_slots: int
    total_rank: int
    dtype: torch.dtype = torch.float32
    device: str = "cpu"

    @property
    def tokens(self) -> int:
        """T."""
        return self.rows * self.tokens_per_row


@dataclass(frozen=True)
class Rule:
    """One line of the table: what it chooses, when, and the reason."""

    backend: str
    path: str
    when: str
    matches: Callable[[Shape], bool]
    why: str


# Triton's thresholds are calculated for an H200 (kernels/README.md, "Calculated, not measured"),
# eager's measured on a 2-core CPU in fp32.
RULES = (
    Rule(
        "triton",
        "sequence",
        "16 tokens or more a row",
        lambda s: s.tokens_per_row >= 16,
        "a row's tokens share their experts: no sort, and K experts' work instead of E's",
    ),
    Rule(
        "triton",
        "sequence",
        "T ≤ 64, T·K < E, R > 256",
        lambda s: _few(s) and s.total_rank > 256,
        "decoding is bound by the experts' bytes: read only those chosen",
    ),
    Rule(
        "triton",
        "matmul",
        "CUDA, 16 bits, T ≥ 256, R ≤ 256·K",
        lambda s: (
            s.device == "cuda"
            and s.dtype.itemsize == 2
            and s.tokens >= 256
            and s.total_rank <= 256 * s.num_slots
        ),
        "all experts at cuBLAS's speed cost no more than a sort and K passes over y; for fewer"
        " tokens its five launches do",
    ),
    Rule(
        "triton",
        "dense",
        "R ≤ 190·K, or T ≤ 64",
        lambda s: s.total_rank <= 190 * s.num_slots or s.tokens <= 64,
        "bound by x and y: all experts in one product cost no more than a sort and K passes over y",
    ),
    Rule(
        "triton",
        "grouped",
        "else",
        lambda s: True,
        "all experts' products would cost more than sorting and K passes over y",
    ),
    Rule(
        "eager",
        "sequence",
        "16 tokens or more a row",
        lambda s: s.tokens_per_row >= 16,
        "they pay for gathering their experts' factors",
    ),
    Rule(
        "eager",
        "sequence",
        "rows·K ≤ min(E, 64), or rows ≤ 16, rows·K ≤ 32 and E ≥ 4·K",
        lambda s: (
            s.rows * s.num_slots <= min(s.num_experts, 64)
            or (s.rows <= 16 and s.rows * s.num_slots <= 32 and s.num_experts >= 4 * s.num_slots)
        ),
        "so few rows read their experts' blocks alone, faster than one product with all of them",
    ),
    Rule(
        "eager",
        "dense",
        "E ≤ 4·K",
        lambda s: s.num_experts <= 4 * s.num_slots,
        "E / K times the work of grouped, at about 4 times its speed",
    ),
    Rule("eager", "grouped", "else", lambda s: True, "its time does not grow with E"),
    Rule(
        "reference",
        "dense",
        "always",
        lambda s: True,
        "the specification computes all experts on every path",
    ),
)


def can_decode(shape: Shape) -> bool:
    """Whether the kernels may route by themselves (`plan_decoding`): few tokens, where launches are
    the cost, of a `TopK` router with E choices (a null expert is one).
    """
    few = shape.tokens_per_row == 1 and shape.tokens <= DECODE_TOKENS
    fits = shape.num_experts <= ROUTED_CHOICES and shape.num_slots <= DECODE_SLOTS
    return few and fits and shape.dtype.itemsize <= 4


def routes_in_expand(shape: Shape) -> bool:
    """Whether a token is best routed in the expand (path "decode"), which computes all experts.

    A program holds all choices' logits; and where few of many bytes are chosen, to read only those
    is worth the launches of a routing before. R is that of one linear.
    """
    wasteful = _few(shape) and shape.total_rank > 256
    return can_decode(shape) and shape.num_experts <= DECODE_CHOICES and not wasteful


def choose_backend(shape: Shape) -> str:
    """triton on a CUDA device for 16- and 32-bit floating point where Triton is installed, else
    eager.
    """
    return (
        "triton" if HAS_TRITON and shape.device == "cuda" and shape.dtype.itemsize <= 4 else "eager"
    )


def choose_path(backend: str, shape: Shape) -> Rule:
    """The first rule of the backend that matches; one without rules of its own takes eager's."""
    named = [rule for rule in RULES if rule.backend == backend]
    return next(rule for rule in named or _rules_of("eager") if rule.matches(shape))


def explain(shape: Shape, *, backend: str | None = None, path: str | None = None) -> str:
    """Which backend and path this shape takes and why, with every line of the table that was asked
    before.
    """
    chosen = backend or choose_backend(shape)
    reason = "named by the caller" if backend else f"{shape.device}, {shape.dtype}"
    lines = [f"backend {chosen}: {reason}"]
    if path is not None:
        return "\n".join([*lines, f"path {path}: named by the caller"])
    taken = choose_path(chosen, shape)
    for rule in _rules_of(taken.backend):
        if rule is taken:
            lines.append(f"path {rule.path}: {rule.when}; {rule.why}")
            if chosen == "triton" and can_decode(shape):
                first = "path decode" if routes_in_expand(shape) else "routed by two launches"
                lines.append(
                    f"{first}, where the router is the kernels' top-k and no gradient is wanted"
                )
            return "\n".join(lines)
        lines.append(f"  not {rule.path}: no {rule.when}")
    raise AssertionError("the last rule of a backend always matches")


def _rules_of(backend: str) -> list[Rule]:
    return [rule for rule in RULES if rule.backend == backend]


def _few(shape: Shape) -> bool:
    return shape.tokens <= 64 and shape.tokens * shape.num_slots < shape.num_experts
