"""Triton: every path as a fixed number of launches, forward and backward."""

from __future__ import annotations

from dataclasses import fields
from itertools import accumulate

import torch
import triton
from torch import Tensor

from ..dispatch import DECODE_CHOICES, DECODE_TOKENS, MASKED
from ..layout import Layout
from ..plan import Plan, TopK
from ..sharing import of_all_experts, of_slots
from . import operators as ops
from .autograd import Expand, Shrink, in_dtype, logits, screened
from .job import job_of, one_expert
from .routing import logits_width
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


def shrink_shared(x: Tensor, lora_A: Tensor, layout: Layout, plan: Plan) -> tuple[Tensor, ...]:
    """As `shrink`, for a lora_A [Σ_l r_l, d_in] that the experts of a linear share: one product, as
    with one expert.
    """
    job = one_expert(lora_A, x.shape[0])
    if plan.path == "matmul":
        job = job._replace(path="matmul")
    if torch.is_grad_enabled() and (x.requires_grad or lora_A.requires_grad):
        h = Shrink.apply(x, lora_A, job)
    else:
        h = ops.shrink(x, in_dtype(lora_A, x.dtype, x.shape[0], job), job)
    if plan.path in MASKED:
        return of_all_experts(h, layout)
    return of_slots(h, layout, plan.num_tokens, plan.num_slots)


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


def route(x: Tensor, router: TopK, num_slots: int) -> tuple[Tensor, Tensor, Tensor]:
    """(ids, weights, slot_experts) [T, K] of a few tokens x [T, d], in two launches; slot_experts:
    ids with 0 for -1.
    """
    refuse_gradients("a routing of the kernels", x=x, router=router.weight)
    ids, weights, experts = ops.router_top_k(x, *_flags(router), num_slots)
    return ids, weights, experts if router.null_expert else ids


def _flags(router: TopK) -> tuple:
    """The router as an operator takes it."""
    return tuple(getattr(router, field.name) for field in fields(router))


def _decode_shrink(
    x: Tensor, lora_A: Tensor, layout: Layout, plan: Plan, router: TopK
) -> tuple[Tensor, ...]:
    """h of each linear as fp32 planes [splits, T, … R_l]: views of one tensor that begin with the
    logits of x and end with the linear's ranks.
    """
    refuse_gradients("path='decode'", x=x, lora_A=lora_A, router=router.weight)
    choices = router.weight.shape[0]
    if plan.rows > DECODE_TOKENS or choices > DECODE_CHOICES:
        raise ValueError(
            f"path='decode' got T={plan.rows} and E={choices}, expected at most {DECODE_TOKENS}"
            f" tokens and {DECODE_CHOICES} choices: use plan_decoding, or route and build_plan"
        )
    planes = ops.decode_shrink(
        x, router.weight, lora_A, router.input_norm, job_of(plan, layout, False)
    )
    ends = accumulate(layout.totals, initial=logits_width(router))
    return tuple(planes[:, :, :end] for end in list(ends)[1:])


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
    refuse_gradients("path='decode'", lora_B=lora_B, out=out)
    if out is None:
        y = h.new_empty((plan.num_tokens, lora_B.shape[1]), dtype=dtype or h.dtype)
    elif inplace and out.is_contiguous():
        y = out
    else:
        y = out.clone(memory_format=torch.contiguous_format)
    flat = y.view(plan.num_tokens, lora_B.shape[1])
    # The operator writes the plan's ids: they may not come in by the job as well.
    job = job_of(plan, layout, False)._replace(ids=layout.experts)
    routing = (plan.expert_ids, plan.weights)
    ops.decode_expand_(h, lora_B, *_flags(router), *routing, flat, out is not None, job)
    return y


def refuse_gradients(what: str, **tensors: Tensor | None) -> None:
    """Raise where the decode path, which has no backward pass, would silently cut one off."""
    if not torch.is_grad_enabled():
        return
    for name, tensor in tensors.items():
        if tensor is not None and tensor.requires_grad:
            raise ValueError(
                f"{name} requires a gradient, which {what} does not give: run it under"
                " torch.no_grad(), or route and use build_plan"
            )


__all__ = ["expand", "interpreted", "logits", "route", "shrink", "shrink_shared", "why_not"]
