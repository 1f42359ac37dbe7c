"""The shapes of the kernel benchmark as data: for a CPU, for a GPU, and for a test."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True)
class Case:
    """One linear d_in → d_out under E experts of rank r, K a token, T tokens; rows of
    tokens_per_row share theirs.
    """

    tokens: int
    d_in: int
    d_out: int
    experts: int
    rank: int
    top_k: int = 2
    tokens_per_row: int = 1
    where: str = ""

    @property
    def name(self) -> str:
        """Where the shape is from, and the shape."""
        rows = f" rows of {self.tokens_per_row}" if self.tokens_per_row > 1 else ""
        linear = f"T={self.tokens}{rows} {self.d_in}→{self.d_out}"
        experts = f"E={self.experts} r={self.rank} K={self.top_k}"
        return f"{self.where} {linear} {experts}".strip()


@dataclass(frozen=True)
class Model:
    """A Llama of random weights under a mixture: sizes, the mixture's, and what it is given."""

    name: str
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    vocab: int
    batch: int
    length: int
    new_tokens: int
    experts: int = 8
    rank: int = 16
    top_k: int = 2

    def named(self, tokens: int) -> str:
        """The model and its mixtures for so many tokens."""
        return f"{self.name} T={tokens} E={self.experts} r={self.rank} K={self.top_k}"


@dataclass(frozen=True)
class Suite:
    """What one run measures.

    cases: forward and backward; the first is the one that most targets are about.
    growth: cases that differ in E alone; their times over the first's are a target.
    decode: shapes of which decode_tokens are decoded; layer, model: what is measured as a whole.
    sweep: the middle of the scaling plots; axes: the values of each of its fields.
    tiny: whether it runs, no figures to keep.
    interpreted: a kernel takes a second, so few of each kind.
    """

    name: str
    dtype: torch.dtype
    cases: tuple[Case, ...]
    growth: tuple[Case, ...]
    decode: tuple[Case, ...]
    layer: Model
    model: Model
    sweep: Case
    axes: tuple[tuple[str, tuple[int, ...]], ...]
    rounds: int
    decode_tokens: tuple[int, ...] = (1, 16, 64)
    tiny: bool = False
    interpreted: bool = False

    def decoding(self) -> list[Case]:
        """Every shape of `decode` with every number of tokens."""
        return [
            replace(case, tokens=tokens) for case in self.decode for tokens in self.decode_tokens
        ]

    def scaling(self) -> list[tuple[str, int, Case]]:
        """(field, value, case) of every point of the scaling plots."""
        return [
            (name, value, replace(self.sweep, **{name: value}))
            for name, values in self.axes
            for value in values
        ]


# The table of bounds for the H200.
SQUARE = Case(8192, 4096, 4096, 8, 16)
TABLE = (
    SQUARE,
    replace(SQUARE, rank=64),
    replace(SQUARE, experts=64),
    # Ordinary configurations whose ranks lie between the dense path's tiles and the grouped path.
    replace(SQUARE, rank=32),
    replace(SQUARE, experts=16),
    replace(SQUARE, tokens=2048),
    replace(SQUARE, tokens=1),
    Case(8192, 4096, 14336, 8, 16, where="Llama-3-8B gate"),
    Case(8192, 14336, 4096, 8, 16, where="Llama-3-8B down"),
)
SMOLLM2 = (
    Case(8192, 576, 576, 8, 16, where="SmolLM2-135M q"),
    Case(8192, 576, 1536, 8, 16, where="SmolLM2-135M gate"),
    Case(8192, 1536, 576, 8, 16, where="SmolLM2-135M down"),
)
LAYER = Model("Llama-3-8B layer", 1, 4096, 14336, 32, 8, 256, 4, 2048, 0)
MODEL = Model("Llama of 4 layers", 4, 1024, 4096, 16, 8, 8192, 4, 512, 32)

CUDA = Suite(
    name="cuda",
    dtype=torch.bfloat16,
    cases=(*TABLE, *SMOLLM2, replace(SQUARE, tokens_per_row=1024)),
    growth=(SQUARE, replace(SQUARE, experts=64), replace(SQUARE, experts=1024)),
    decode=(SQUARE, replace(SQUARE, experts=64, rank=64)),
    layer=LAYER,
    model=MODEL,
    sweep=Case(8192, 4096, 4096, 32, 16),
    axes=(
        ("tokens", (512, 2048, 8192, 16384)),
        ("experts", (4, 8, 16, 32, 64, 128)),
        ("top_k", (1, 2, 4, 8)),
        ("rank", (8, 16, 32, 64)),
    ),
    rounds=11,
)

TINY_LAYER = Model("tiny layer", 1, 32, 48, 2, 1, 32, 1, 8, 0, experts=4, rank=4)
TINY_MODEL = Model("tiny model", 2, 32, 48, 2, 1, 32, 1, 8, 2, experts=4, rank=4)
SMALL = Case(1024, 1024, 1024, 8, 16)
CPU = Suite(
    name="cpu",
    dtype=torch.float32,
    cases=(
        SMALL,
        replace(SMALL, experts=64, rank=8),
        replace(SMALL, experts=1024, rank=8),
        replace(SMOLLM2[1], tokens=1024),
        replace(SMALL, tokens_per_row=128),
    ),
    growth=(replace(SMALL, experts=64, rank=8), replace(SMALL, experts=1024, rank=8)),
    decode=(SMALL, replace(SMALL, experts=64, rank=8)),
    layer=TINY_LAYER,
    model=TINY_MODEL,
    sweep=Case(1024, 512, 512, 32, 8),
    axes=(
        ("tokens", (128, 512, 2048)),
        ("experts", (4, 8, 32, 128, 512)),
        ("top_k", (1, 2, 4, 8)),
        ("rank", (4, 8, 16, 32)),
    ),
    rounds=5,
)

TINY = Case(128, 64, 32, 4, 4)
QUICK = Suite(
    name="quick",
    dtype=torch.float32,
    cases=(TINY, replace(TINY, tokens_per_row=16)),
    growth=(TINY, replace(TINY, experts=16)),
    decode=(TINY,),
    layer=TINY_LAYER,
    model=TINY_MODEL,
    sweep=TINY,
    axes=(("tokens", (64, 128)), ("experts", (4, 16)), ("top_k", (1, 2)), ("rank", (4, 8))),
    rounds=2,
    decode_tokens=(1, 4),
    tiny=True,
)
# Under Triton's interpreter, which multiplies bf16 wrongly and takes milliseconds a block.
INTERPRETED = replace(
    QUICK,
    name="interpreted",
    dtype=torch.float16,
    cases=(replace(TINY, tokens=8), replace(TINY, tokens=1)),
    growth=(replace(TINY, tokens=8), replace(TINY, tokens=8, experts=8)),
    decode_tokens=(1,),
    rounds=1,
    interpreted=True,
)
