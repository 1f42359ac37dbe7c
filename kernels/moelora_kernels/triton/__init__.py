"""Triton: every path as a fixed number of launches, forward and backward, as torch operators."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from ..dispatch import DECODE_RANKS, Shape, can_decode
from ..plan import Plan, TopK
from ..rank_rows import ranks_of
from . import op, op_decode
from .router import logits
from .shrink import shrink_kernel
from .slot_map import SlotMap, slot_map
from .tiles import group_block

Offsets = tuple[int, ...]
# A program of the single launch holds all ranks; more would spill, in fp32 earlier.
FUSED_RANKS = 256
FUSED_RANKS_FP32 = 64
# What every program of the single launch reads again (router and lora_A); beyond it a launch more
# costs less.
FUSED_BYTES = 1 << 16
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def shrink(
    x: Tensor, lora_A: Tensor, rank_offsets: tuple[Offsets, ...], plan: Plan
) -> tuple[Tensor, ...]:
    """h_l = x A_lᵀ fp32 for every linear l: dense [T, R_l]; grouped, sequence [T, K, max rank of
    the linear].
    """
    if plan.router is not None:
        return _decode_shrink(x, lora_A, rank_offsets, plan, plan.router)
    slots = _slots(plan, x, lora_A)
    site = [offset for offsets in rank_offsets for offset in offsets]
    h = op.shrink(
        x,
        lora_A,
        plan.expert_ids,
        _arrays(slots),
        site,
        plan.num_experts,
        plan.path,
        plan.tokens_per_row,
        slots.block if slots else 0,
        plan.tiles,
    )
    if plan.path == "dense":
        return (
            (h,)
            if len(rank_offsets) == 1
            else h.split([offsets[-1] for offsets in rank_offsets], dim=1)
        )
    ranks = [max(ranks_of(offsets)) for offsets in rank_offsets]
    return tuple(
        own if rank == h.shape[3] else own[..., :rank] for own, rank in zip(h.unbind(2), ranks)
    )


def expand(
    h: Tensor,
    lora_B: Tensor,
    rank_offsets: Offsets,
    scaling: tuple[float, ...],
    plan: Plan,
    out: Tensor | None = None,
    *,
    inplace: bool = False,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """y = out + Σ_e w_e · s_e · h_e B_e; h from `shrink`, lora_B [R, d_out], out [..., d_out]."""
    if plan.router is not None:
        return _decode_expand(
            h, lora_B, rank_offsets, scaling, plan, plan.router, out, inplace, dtype
        )
    slots = _slots(plan, h, lora_B, plan.weights)
    flat = None if out is None else out.reshape(plan.num_tokens, out.shape[-1])
    tensors = (h, lora_B, plan.weights, flat, plan.expert_ids, _arrays(slots))
    fixed = (
        rank_offsets,
        scaling,
        plan.path,
        plan.tokens_per_row,
        slots.block if slots else 0,
        plan.tiles,
    )
    if out is None:
        return op.expand(*tensors, *fixed, dtype or h.dtype)
    learning = torch.is_grad_enabled() and any(
        t.requires_grad for t in (h, lora_B, plan.weights, out)
    )
    if inplace and not learning and out.is_contiguous():
        op.expand_(*tensors, *fixed)
        return out
    return op.expand(*tensors, *fixed, out.dtype).view(out.shape)


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


def fused_mixture(
    x: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    rank_offsets: Offsets,
    scaling: tuple[float, ...],
    plan: Plan,
    out: Tensor | None = None,
) -> Tensor:
    """y = out + Σ_e w_e · s_e · (x A_eᵀ) B_e of one linear in a single launch, on a plan of the
    dense path.

    Raises: ValueError where the ranks do not fit into one program, or for another path.
    """
    largest = FUSED_RANKS_FP32 if x.dtype == torch.float32 else FUSED_RANKS
    if plan.path != "dense" or rank_offsets[-1] > largest:
        raise ValueError(
            f"fused_mixture got path={plan.path!r} and R={rank_offsets[-1]}, expected"
            f" path='dense' and at most {largest} ranks in {x.dtype}: use lora_mixture"
        )
    rows = x.reshape(plan.num_tokens, x.shape[-1])
    flat = None if out is None else out.reshape(plan.num_tokens, out.shape[-1])
    y, _ = op.fused(
        rows,
        lora_A,
        lora_B,
        plan.weights,
        flat,
        plan.expert_ids,
        rank_offsets,
        scaling,
        plan.tokens_per_row,
        plan.tiles,
        x.dtype if out is None else out.dtype,
    )
    return y if out is None else y.view(out.shape)


def _decode_shrink(x: Tensor, lora_A: Tensor, site: tuple[Offsets, ...], plan: Plan, router: TopK):
    """h of each linear as fp32 planes [splits, T, R_l]; where one launch does all, x itself."""
    _refuse_gradients(x=x, lora_A=lora_A, router=router.weight)
    plan.memo.clear()
    for offsets in site:
        if not can_decode(
            Shape(plan.rows, 1, plan.num_experts, plan.num_slots, offsets[-1], x.dtype)
        ):
            raise ValueError(
                f"path='decode' got T={plan.rows}, E={plan.num_experts}, R={offsets[-1]} in"
                f" {x.dtype}, expected at most 64 tokens, 64 experts and {DECODE_RANKS} ranks:"
                " route, and use build_plan"
            )
    bytes_read = x.shape[1] * (4 * plan.num_experts + x.element_size() * len(lora_A))
    if len(site) == 1 and bytes_read <= FUSED_BYTES and len(lora_A) <= FUSED_RANKS_FP32:
        plan.memo["lora_A"] = lora_A
        return (x,)
    plan.memo["logits"], h = op_decode.decode_shrink(x, router.weight, lora_A, plan.tiles)
    return h.split([offsets[-1] for offsets in site], dim=2)


def _decode_expand(
    h: Tensor,
    lora_B: Tensor,
    rank_offsets: Offsets,
    scaling: tuple[float, ...],
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
    else:
        y = (
            out
            if inplace and out.is_contiguous()
            else out.clone(memory_format=torch.contiguous_format)
        )
    routed = (
        router.selection_bias,
        router.norm,
        scaling,
        rank_offsets,
        plan.expert_ids,
        plan.weights,
    )
    last = (y.view(plan.num_tokens, lora_B.shape[1]), out is not None, plan.tiles)
    lora_A = plan.memo.get("lora_A")
    if lora_A is not None:
        op_decode.fused_(h, router.weight, lora_A, lora_B, *routed, *last)
    else:
        op_decode.decode_expand_(plan.memo["logits"], h, lora_B, *routed, *last)
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


def _slots(plan: Plan, *inputs: Tensor) -> SlotMap | None:
    """The sorted slots where the path, or its backward pass, needs them; kept on the plan."""
    learning = torch.is_grad_enabled() and any(t.requires_grad for t in inputs)
    if plan.path == "dense" or (plan.path == "sequence" and not learning):
        return None
    slots = plan.memo.get("slot_map")
    if slots is None:
        block = group_block(plan.num_tokens, plan.num_experts)
        slots = slot_map(plan.expert_ids, plan.tokens_per_row, plan.num_experts, block)
        plan.memo["slot_map"] = slots
    return slots


def _arrays(slots: SlotMap | None) -> list[Tensor]:
    return [] if slots is None else list(slots[1:])


__all__ = ["expand", "fused_mixture", "interpreted", "logits", "shrink", "why_not"]
