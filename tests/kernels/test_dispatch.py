"""The table of backends and paths: what it chooses, and that it explains itself."""

from __future__ import annotations

import pytest
import torch
from moelora_kernels import BACKENDS, PATHS, Shape, can_decode, choose_backend, explain
from moelora_kernels.dispatch import RULES, choose_path, routes_in_expand

BF16 = torch.bfloat16


@pytest.mark.parametrize(
    ("rows", "tokens_per_row", "num_experts", "num_slots", "path"),
    [
        (1, 1, 8, 2, "sequence"),  # decode
        (16, 1, 8, 2, "sequence"),  # decode of a small batch: 32 blocks of 4 times as many
        (17, 1, 8, 2, "dense"),
        (4, 1, 4, 2, "dense"),  # all experts are no more than twice the chosen ones
        (8, 128, 8, 2, "sequence"),  # one choice for a long sequence
        (512, 2, 8, 2, "dense"),  # one choice for a short sequence does not pay
        (1024, 1, 8, 2, "dense"),
        (1024, 1, 9, 2, "grouped"),
        (1024, 1, 1024, 2, "grouped"),
        (33, 1, 1024, 2, "grouped"),  # 66 blocks are too many to copy
        (0, 1, 8, 2, "sequence"),
    ],
)
def test_eager(rows: int, tokens_per_row: int, num_experts: int, num_slots: int, path: str) -> None:
    shape = Shape(rows, tokens_per_row, num_experts, num_slots, 16 * num_experts)
    assert choose_path("eager", shape).path == path


@pytest.mark.parametrize(
    ("shape", "path"),
    [
        (Shape(8192, 1, 8, 2, 128), "dense"),  # bound by x and y
        (Shape(8192, 1, 64, 2, 1024), "grouped"),
        (Shape(8192, 1, 8, 2, 380), "dense"),  # 190 K
        (Shape(8192, 1, 8, 2, 381), "grouped"),
        (Shape(8192, 1, 64, 8, 1024), "dense"),
        (Shape(8, 1024, 64, 2, 4096), "sequence"),
        (Shape(1, 1, 8, 2, 128), "dense"),  # decode: few bytes
        (Shape(1, 1, 64, 2, 1024), "sequence"),  # decode: only the chosen experts' bytes
        (Shape(64, 1, 8, 2, 1024), "dense"),  # decode: every expert is chosen by somebody
        (Shape(0, 1, 8, 2, 128), "dense"),
        (Shape(8192, 1, 8, 2, 128, BF16, "cuda"), "matmul"),  # cuBLAS's thin products
        (Shape(8192, 1, 8, 2, 512, torch.float16, "cuda"), "matmul"),  # 256 K
        (Shape(8192, 1, 8, 2, 513, BF16, "cuda"), "grouped"),
        (Shape(8192, 1, 8, 2, 128, torch.float32, "cuda"), "dense"),  # no TF32 unasked
        (Shape(255, 1, 8, 2, 128, BF16, "cuda"), "dense"),  # bound by launches
        (Shape(128, 4, 8, 2, 128, BF16, "cuda"), "matmul"),  # short rows
        (Shape(8, 1024, 8, 2, 128, BF16, "cuda"), "sequence"),
    ],
)
def test_triton(shape: Shape, path: str) -> None:
    assert choose_path("triton", shape).path == path


@pytest.mark.parametrize(
    ("device", "dtype", "backend"),
    [
        ("cuda", BF16, "triton"),
        ("cuda", torch.float32, "triton"),
        ("cuda", torch.float64, "eager"),
        ("cpu", BF16, "eager"),
        ("mps", torch.float16, "eager"),
    ],
)
def test_the_backend(device: str, dtype: torch.dtype, backend: str) -> None:
    assert choose_backend(Shape(8, 1, 8, 2, 128, dtype, device)) == backend


def test_every_backend_has_an_answer_and_only_known_names_are_in_the_table() -> None:
    for backend in [*BACKENDS, "one of tomorrow"]:
        assert choose_path(backend, Shape(33, 1, 8, 2, 10**6)).path in PATHS
    assert {rule.backend for rule in RULES} == set(BACKENDS)
    assert {rule.path for rule in RULES} == set(PATHS)


def test_explain() -> None:
    text = explain(Shape(8192, 1, 64, 2, 1024, BF16, "cuda"))
    lines = text.splitlines()
    assert lines[0] == "backend triton: cuda, torch.bfloat16"
    assert lines[1] == "  not sequence: no 16 tokens or more a row"
    assert lines[3] == "  not matmul: no CUDA, 16 bits, T ≥ 256, R ≤ 256·K"
    assert lines[4] == "  not dense: no R ≤ 190·K, or T ≤ 64"
    assert lines[-1].startswith("path grouped: else; all experts' products would cost more")
    assert (
        explain(Shape(4, 1, 8, 2, 1), backend="eager").splitlines()[0]
        == "backend eager: named by the caller"
    )
    assert explain(Shape(4, 1, 8, 2, 1), path="dense").endswith("path dense: named by the caller")
    decoding = explain(Shape(4, 1, 8, 2, 128, BF16, "cuda"))
    assert decoding.splitlines()[-1].startswith("path decode, where the router")
    decoding = explain(Shape(4, 1, 256, 2, 2048, BF16, "cuda"))
    assert decoding.splitlines()[-1].startswith("routed by two launches, where the router")


def test_decoding_has_limits() -> None:
    for shape in (
        Shape(64, 1, 64, 2, 128, BF16),
        Shape(1, 1, 1025, 2, 10**4, BF16),
        Shape(8, 1, 8, 2, 4096),
    ):
        assert can_decode(shape)
    for shape in (
        Shape(65, 1, 8, 2, 16, BF16),
        Shape(1, 2, 8, 2, 16),
        Shape(1, 1, 2049, 2, 16),
        Shape(1, 1, 64, 17, 16),
        Shape(1, 1, 8, 2, 16, torch.float64),
    ):
        assert not can_decode(shape)


@pytest.mark.parametrize(
    ("shape", "inside"),
    [
        (Shape(1, 1, 8, 2, 256), True),
        (Shape(1, 1, 8, 2, 512), False),  # a routing before saves three quarters of the bytes
        (Shape(4, 1, 8, 2, 512), True),  # the tokens need most of them
        (Shape(64, 1, 64, 2, 4096), True),
        (Shape(1, 1, 65, 2, 65), False),
        (Shape(65, 1, 8, 2, 16), False),
    ],
)
def test_where_a_token_is_routed(shape: Shape, inside: bool) -> None:
    assert routes_in_expand(shape) is inside
