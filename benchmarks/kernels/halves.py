"""The one place of the benchmarks that calls the two halves of a mixture by themselves: the decode
path has no other entry.
"""

from __future__ import annotations

import torch
from moelora_kernels import Layout, TopK, build_decode_plan, expand, shrink
from torch import Tensor


@torch.no_grad()
def decoded(
    x: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    router: Tensor,
    top_k: int,
    rank_offsets: tuple[int, ...],
    scaling: tuple[float, ...],
    out: Tensor,
) -> tuple[Tensor, Tensor]:
    """y and the experts that the kernels chose themselves, [T, K]."""
    plan = build_decode_plan(TopK(router), len(x), top_k)
    layout = Layout((rank_offsets,), scaling, x.device)
    (h,) = shrink(x, lora_A, layout, plan)
    y = expand(h, lora_B, layout, plan, out)
    return y, plan.expert_ids
