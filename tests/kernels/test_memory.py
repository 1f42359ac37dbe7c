"""What is made and what is kept: nothing of size [T, K, d_out] or [T, E, d_out]."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from moelora_kernels import PATHS, build_plan, expand, shrink
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode

from tests.kernels.cases import Case, make

CASE = Case(rows=4, tokens_per_row=32, ranks=(4, 4, 4, 4), num_slots=3, d_in=64, d_out=64)
TOKENS = CASE.rows * CASE.tokens_per_row


class LargestTensor(TorchDispatchMode):
    """The numel of the largest tensor that any operation gives."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, Tensor):
                self.numel = max(self.numel, tensor.numel())
        return result


@pytest.mark.parametrize("path", PATHS)
def test_nothing_larger_than_x_and_out_is_made(path: str) -> None:
    ids, inputs = make(CASE, torch.float32)
    leaves = {n: t.requires_grad_() for n, t in inputs.items() if t is not None}
    with LargestTensor() as largest:
        weights = leaves["weights"]
        plan = build_plan(ids, weights, 4, total_rank=16, tokens_per_row=32, path=path)
        (h,) = shrink(leaves["x"], leaves["lora_A"], CASE.layout, plan)
        y = expand(h, leaves["lora_B"], CASE.layout, plan, leaves["out"])
        y.backward(torch.ones_like(y))
    assert largest.numel <= TOKENS * CASE.d_out < TOKENS * CASE.num_slots * CASE.d_out


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_only_inputs_and_h_are_kept(path: str, dtype: torch.dtype) -> None:
    ids, inputs = make(CASE, dtype)
    leaves = {n: t.requires_grad_() for n, t in inputs.items() if t is not None}
    plan = build_plan(ids, leaves["weights"], 4, total_rank=16, tokens_per_row=32, path=path)
    used = plan.gate if path in ("dense", "matmul") else plan.weights
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        (h,) = shrink(leaves["x"], leaves["lora_A"], CASE.layout, plan)
        expand(h, leaves["lora_B"], CASE.layout, plan, leaves["out"])
    wanted = (leaves["x"], leaves["lora_A"], h, leaves["lora_B"], used)
    assert [t.data_ptr() for t in kept] == [t.data_ptr() for t in wanted]


def test_h_is_of_rank_size() -> None:
    ids, inputs = make(CASE, torch.float32)
    x, lora_A, _, weights, _ = inputs.values()
    for path, per_token in {"dense": 16, "matmul": 16, "grouped": 12, "sequence": 12}.items():
        plan = build_plan(ids, weights, 4, total_rank=16, tokens_per_row=32, path=path)
        (h,) = shrink(x, lora_A, CASE.layout, plan)
        assert h.numel() == TOKENS * per_token
