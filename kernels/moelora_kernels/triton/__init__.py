"""Triton: every path as a fixed number of launches, forward and backward."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from ..dispatch import DECODE_RANKS, Shape, can_decode
from ..layout import Layout
from ..plan import Plan, TopK
from . import operators as ops
from .autograd import Expand, Shrink, in_dtype, screened
from .job import job_of
from .router import logits
from .shrink import shrink_kernel

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def shrink(x: Tensor, lora_A: Tensor, layout: Layout, plan: Plan) -> tuple[Tensor, ...]:
    """h_l = x A_lᵀ fp32 for every linear l: of all experts [T, R_l], else [T, K, max rank of the
    linear].
    """
    if plan.router is not None:
        return _decode_shrink(x, lora_A, layout, plan, plan.router)
    learns = torch.is_grad_enabled() and (x.requires_grad or lora_A.requires_grad)
    job = job_of(plan, layout, learns)
    if learns:
        h = Shrink.apply(x, lora_A, job)
    else:
        h = ops.shrink(x, in_dtype(lora_A, x.dtype, x.shape[0], job), job)
    if job.masked:
        return (h,) if layout.num_linears == 1 else h.split(layout.totals, dim=1)
    return tuple(
        own if width == layout.max_rank else own[..., :width]
        for own, width in zip(h.unbind(2), layout.widths, strict=True)
    )


def expand(
    h: Tensor,
    lora_B: Tensor,
    layout: Layout,
    plan: Plan,
    out: Tensor | None = None,
    *,
    inplace: bool = False,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """y = out + Σ_e w_e · s_e · h_e B_e; h from `shrink`, lora_B [R, d_out], out [..., d_out]."""
    if plan.router is not None:
        return _decode_expand(h, lora_B, layout, plan, plan.router, out, inplace, dtype)
    inputs = (out, h, lora_B, plan.weights)
    learns = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs)
    job = job_of(plan, layout, learns)
    shape = (plan.num_tokens, lora_B.shape[1])
    inplace = inplace and out is not None and out.is_contiguous()
    dtype = out.dtype if out is not None else dtype or h.dtype
    flat = None if out is None else out.reshape(shape)
    if learns:
        # A graph has no use for writing in place: the compiler sees to it.
        inplace = inplace and not torch.compiler.is_compiling()
        y = Expand.apply(out if inplace else flat, h, lora_B, plan.weights, job, dtype, inplace)
    else:
        _, factor, poison = screened(lora_B, dtype, shape[0], job)
        if inplace:
            ops.expand_(h, factor, poison, plan.weights, flat, job)
            return out  # type: ignore[return-value]
        y = ops.expand(h, factor, poison, plan.weights, flat, dtype, job)
    return y if out is None else y.view(out.shape)


def why_not(x: Tensor, weights: Tensor) -> str | None:
    """Why these kernels cannot run on x with a routing's (or router's) weights, or None if they
    can.
    """
    if x.dtype not in DTYPES:
        return f"x is {x.dtype}, expected bfloat16, float16 or float32: pass backend='eager'"
    if weights.dtype != torch.float32:
        return f"the weights are {weights.dtype}, expected torch.float32: pass them as .float()"
    if x.device.type == "cpu" and not interpreted():
        return (
            "x is on the CPU, expected a GPU or Triton's interpreter: move it, or pass"
            " backend='eager'"
        )
    return None


def interpreted() -> bool:
    """Whether Triton's interpreter runs the kernels, on any device."""
    return not isinstance(shrink_kernel, triton.JITFunction)


def _decode_shrink(x: Tensor, lora_A: Tensor, layout: Layout, plan: Plan, router: TopK):
    """h of each linear as fp32 planes [splits, T, R_l]."""
    _refuse_gradients(x=x, lora_A=lora_A, router=router.weight)
    for total in layout.totals:
        if not can_decode(Shape(plan.rows, 1, plan.num_experts, plan.num_slots, total, x.dtype)):
            raise ValueError(
                f"path='decode' got T={plan.rows}, E={plan.num_experts}, R={total} in {x.dtype},"
                f" expected at most 64 tokens, 64 experts and {DECODE_RANKS} ranks: route, and use"
                " build_plan"
            )
    job = job_of(plan, layout, False)
    plan.memo["logits"], h = ops.decode_shrink(x, router.weight, lora_A, job)
    return h.split(layout.totals, dim=2)


def _decode_expand(
    h: Tensor,
    lora_B: Tensor,
    layout: Layout,
    plan: Plan,
    router: TopK,
    out: Tensor | None,
    inplace: bool,
    dtype: torch.dtype | None,
) -> Tensor:
    """`expand` of the decode path; out None needs the dtype, as h is fp32 there."""
    _refuse_gradients(lora_B=lora_B, out=out)
    if out is None:
        y = h.new_empty((plan.num_tokens, lora_B.shape[1]), dtype=dtype or h.dtype)
    elif inplace and out.is_contiguous():
        y = out
    else:
        y = out.clone(memory_format=torch.contiguous_format)
    flat = y.view(plan.num_tokens, lora_B.shape[1])
    # The operator writes the plan's ids: they may not come in by the job as well.
    job = job_of(plan, layout, False)._replace(ids=layout.experts)
    ops.decode_expand_(
        plan.memo["logits"],
        h,
        lora_B,
        router.selection_bias,
        router.norm,
        plan.expert_ids,
        plan.weights,
        flat,
        out is not None,
        job,
    )
    return y


def _refuse_gradients(**tensors: Tensor | None) -> None:
    """Raise where the decode path, which has no backward pass, would silently cut one off."""
    if not torch.is_grad_enabled():
        return
    for name, tensor in tensors.items():
        if tensor is not None and tensor.requires_grad:
            raise ValueError(
                f"{name} requires a gradient, which path='decode' does not give: run it under"
                " torch.no_grad(), or route and use build_plan"
            )


__all__ = ["expand", "interpreted", "logits", "shrink", "why_not"]
