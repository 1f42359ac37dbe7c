"""The entry points: cheap checks, then the backend named by the caller."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import ModuleType

import torch
from torch import Tensor

from . import eager, reference
from .autocast import autocasts, without_autocast
from .dispatch import HAS_TRITON, Shape, choose_backend, choose_path, routes_in_expand
from .layout import Layout, Offsets, layout_of
from .plan import Plan, TopK, build_decode_plan, build_plan, check_router
from .sharing import repeated


def _triton() -> ModuleType:
    # Triton takes longer to import than all the rest of this package, and a CPU has no use for it.
    from . import triton

    return triton


# What gives each backend's module, by its name.
BACKENDS: dict[str, Callable[[], ModuleType]] = {
    "eager": lambda: eager,
    "reference": lambda: reference,
}
if HAS_TRITON:
    BACKENDS["triton"] = _triton


def shrink(
    x: Tensor,
    lora_A: Tensor,
    layout: Layout,
    plan: Plan,
    *,
    backend: str | None = None,
    checked: bool = False,
) -> tuple[Tensor, ...]:
    """h_l = x A_lᵀ for every linear l of a site, not yet weighted by the routing.

    Each h_l has a form of the backend's and the path's own: hand it to `expand` of the same ones,
    if you like after an elementwise φ with φ(0) = 0.

    Args:
        x: [..., d_in], of plan.num_tokens tokens.
        lora_A: [Σ_l R_l, d_in], linear after linear, in each expert after expert; with a shared
            layout [Σ_l r_l, d_in], in each linear what all its experts share.
        layout: Of lora_A, on its device.
        plan: From `build_plan` or `build_decode_plan`.
        backend: A name of `BACKENDS`; None is the plan's own.
        checked: The caller vouches for the arguments, as a model does for its own at every token.

    Raises:
        ValueError, TypeError: for an argument that does not fit the others.
    """
    module = _backend(backend or plan.backend)
    if not checked:
        _check_x(x, lora_A, plan)
        _check_factor("lora_A", lora_A, layout, plan, x)
    _check_runs(module, x, plan.weights)
    x = x.reshape(plan.num_tokens, x.shape[-1])
    if autocasts(x.device.type) and x.dtype != torch.float64:
        x = x.to(torch.get_autocast_dtype(x.device.type))
    with without_autocast(x.device.type):
        if layout.shared:
            if plan.router is None and hasattr(module, "shrink_shared"):
                return module.shrink_shared(x, lora_A, layout, plan)
            lora_A = repeated(lora_A, layout)
        return module.shrink(x, lora_A, layout, plan)


def expand(
    h: Tensor,
    lora_B: Tensor,
    layout: Layout,
    plan: Plan,
    out: Tensor | None = None,
    *,
    inplace: bool = False,
    dtype: torch.dtype | None = None,
    backend: str | None = None,
    checked: bool = False,
) -> Tensor:
    """y = out + Σ_e w_e · s_e · h_e B_e for one linear, in the dtype and shape of out.

    Args:
        h: One of the tensors that `shrink` returned, for the same plan and backend.
        lora_B: [R, d_out], expert after expert.
        layout: Of lora_B with its scaling, on its device.
        plan: The plan that `shrink` had.
        out: [..., d_out], of plan.num_tokens tokens, perhaps columns of a wider tensor; None stands
            for 0, and y is then [T, d_out].
        inplace: Whether the backend may write into out; use only what is returned.
        dtype: y's dtype where out is None; None is h's dtype, which some backends keep in fp32.
        backend: A name of `BACKENDS`; None is the plan's own.
        checked: As in `shrink`.

    Raises:
        ValueError, TypeError: for an argument that does not fit the others.
    """
    module = _backend(backend or plan.backend)
    if not checked:
        _check_factor("lora_B", lora_B, layout, plan, h)
        if out is not None:
            _check_out(out, lora_B.shape[1], plan, h)
    with without_autocast(h.device.type):
        return module.expand(h, lora_B, layout, plan, out, inplace=inplace, dtype=dtype)


def lora_mixture(
    x: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    expert_ids: Tensor,
    expert_weights: Tensor,
    rank_offsets: Offsets,
    scaling: tuple[float, ...],
    out: Tensor | None = None,
    *,
    tokens_per_row: int = 1,
    path: str | None = None,
    backend: str | None = None,
    tiles: str = "",
) -> Tensor:
    """y[t] = out[t] + Σ_k w[t, k] · s_e · (x[t] A_eᵀ) B_e, e = expert_ids[t, k], for one linear.

    Args:
        x: [..., d_in], T tokens.
        lora_A: [R, d_in], expert after expert.
        lora_B: [R, d_out], expert after expert.
        expert_ids: [rows, K] int64; -1 is an empty slot.
        expert_weights: [rows, K] fp32.
        rank_offsets: The E + 1 places where the experts' rows begin.
        scaling: s_e of each of the E experts.
        out: [..., d_out], or None for 0.
        tokens_per_row: T / rows: 1, or the length of sequences that are routed as a whole.
        path: A name of `PATHS`; None lets the table of `dispatch` choose.
        backend: A name of `BACKENDS`; None lets the table choose.
        tiles: A device's tuned tiles for the Triton backend, by name or path.

    Raises:
        ValueError, TypeError: for an argument that does not fit the others.
    """
    plan = build_plan(
        expert_ids,
        expert_weights,
        len(rank_offsets) - 1,
        total_rank=rank_offsets[-1],
        tokens_per_row=tokens_per_row,
        path=path,
        validate=expert_ids.device.type in ("cpu", "cuda") and not torch.compiler.is_compiling(),
        backend=backend,
        dtype=x.dtype,
        tiles=tiles,
    )
    dtype = x.dtype
    if dtype != torch.float64 and autocasts(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
    layout = layout_of(tuple(rank_offsets), tuple(scaling), x.device)
    (h,) = shrink(x, lora_A, layout, plan)
    return expand(h, lora_B, layout, plan, out, dtype=dtype)


def router_logits(x: Tensor, weight: Tensor, *, backend: str | None = None) -> Tensor:
    """x Wᵀ [T, E] to the accuracy of W's dtype, differentiable; no copy of x in it is kept.

    Call it outside of autocast.

    Args:
        x: [T, d] of any floating dtype.
        weight: [E, d] fp32, or fp64 where x is fp64.
        backend: A name of `BACKENDS`; None lets the table of `dispatch` choose.

    Raises:
        ValueError, TypeError: for an argument that does not fit the other.
    """
    if weight.dtype not in (torch.float32, torch.float64) or not x.is_floating_point():
        raise TypeError(
            f"x is {x.dtype} and weight {weight.dtype}, expected floating point and torch.float32:"
            " pass weight.float()"
        )
    if (
        x.dim() != 2
        or weight.dim() != 2
        or x.shape[1] != weight.shape[1]
        or x.device != weight.device
    ):
        raise ValueError(
            f"x is {tuple(x.shape)} on {x.device} and weight {tuple(weight.shape)} on"
            f" {weight.device}, expected [T, d] and [E, d] on one device: flatten x"
        )
    if backend is None:
        fits = weight.dtype == torch.float32
        backend = (
            choose_backend(Shape(len(x), 1, len(weight), 1, 0, x.dtype, x.device.type))
            if fits
            else "eager"
        )
    module = _backend(backend)
    if backend == "triton":
        _check_runs(module, x, weight)
    return getattr(module, "logits", eager.logits)(x, weight)


def plan_decoding(
    x: Tensor,
    router: TopK,
    num_slots: int,
    total_rank: int,
    *,
    tiles: str = "",
    linear: bool = True,
) -> Plan:
    """The plan of a few tokens that the Triton kernels route, without gradients (`can_decode`).

    Path "decode" where they do it while they expand (`build_decode_plan`), else routed here, by two
    launches, for the path of the table. Call it outside of autocast.

    Args:
        x: [T, d], at most 64 tokens.
        router: The top-k router, its weight [C, d] fp32.
        num_slots: K, at most C.
        total_rank: The largest R of the linears that share the plan.
        tiles: As in `build_plan`.
        linear: Whether nothing acts between the halves; with a φ path "decode" cannot be.

    Raises:
        TypeError, ValueError: for a router that is not fp32 or not of x's width, and more slots
            than choices.
    """
    choices, d = router.weight.shape
    shape = Shape(len(x), 1, choices, num_slots, total_rank, x.dtype, x.device.type)
    if linear and routes_in_expand(shape):
        return build_decode_plan(router, len(x), num_slots, tiles=tiles)
    check_router(router, num_slots)
    if x.dim() != 2 or x.shape[1] != d:
        raise ValueError(f"x is {tuple(x.shape)}, expected [T, {d}], the router's width: flatten x")
    module = _backend("triton")
    _check_runs(module, x, router.weight)
    path = choose_path("triton", replace(shape, num_experts=router.num_experts)).path
    ids, weights, slot_experts = module.route(x, router, num_slots)
    routing = (ids, weights, slot_experts, not router.null_expert)
    return Plan(path, router.num_experts, len(x), 1, *routing, "triton", tiles)


def _backend(name: str) -> ModuleType:
    """The backend's module; a name never falls back to another."""
    backend = BACKENDS.get(name)
    if backend is None:
        raise ValueError(f"backend={name!r} is unknown: choose one of {', '.join(BACKENDS)}")
    return backend()


def _check_runs(module: ModuleType, x: Tensor, weights: Tensor) -> None:
    """Raise where the backend cannot run on x's device and the two dtypes."""
    why_not = getattr(module, "why_not", None)
    reason = why_not(x, weights) if why_not else None
    if reason:
        raise ValueError(f"backend={module.__name__.rpartition('.')[2]!r}: {reason}")


def _check_x(x: Tensor, lora_A: Tensor, plan: Plan) -> None:
    """Raise unless x has the plan's tokens and lora_A's features."""
    if plan.num_tokens * x.shape[-1] != x.numel() or x.shape[-1] != lora_A.shape[-1]:
        raise ValueError(
            f"x is {tuple(x.shape)}, expected {plan.num_tokens} tokens (the plan's) of"
            f" {lora_A.shape[-1]} features (lora_A's): flatten x, or build the plan for this x"
        )


def _check_factor(name: str, factor: Tensor, layout: Layout, plan: Plan, other: Tensor) -> None:
    """Raise unless the factor's rows are those of the layout, and all is of one device."""
    if not (factor.is_floating_point() and other.is_floating_point()):
        raise TypeError(
            f"{name} is {factor.dtype} and its input {other.dtype}, expected floating point:"
            " dequantize the factor, pass embeddings and not ids"
        )
    if layout.num_experts != plan.num_experts:
        raise ValueError(
            f"the layout of {name} has {layout.num_experts} experts, expected {plan.num_experts}"
            " (the plan's num_experts): pass the layout of this factor"
        )
    if name == "lora_B" and (layout.scaling is None or layout.num_linears != 1):
        raise ValueError(
            f"the layout of lora_B has {layout.num_linears} linears and"
            f" scaling={layout.scaling}, expected one linear and a scaling for each expert:"
            " Layout((rank_offsets,), scaling)"
        )
    if name == "lora_B" and layout.shared:
        raise ValueError(
            "the layout of lora_B is shared, expected each expert's own rows: experts share lora_A"
            " alone"
        )
    if factor.dim() != 2 or factor.shape[0] != layout.rows:
        raise ValueError(
            f"{name} is {tuple(factor.shape)}, expected 2 dimensions and {layout.rows} rows,"
            " the sum of the ranks in rank_offsets: stack the experts along rank, one after another"
        )
    if not factor.device == other.device == plan.weights.device == layout.device:
        raise ValueError(
            f"{name} is on {factor.device}, its input on {other.device}, the plan on"
            f" {plan.weights.device}, the layout on {layout.device}, expected one device: move them"
            " to one"
        )


def _check_out(out: Tensor, d_out: int, plan: Plan, h: Tensor) -> None:
    """Raise unless out has the plan's tokens and lora_B's features, on h's device."""
    if out.shape[-1] != d_out or out.numel() != plan.num_tokens * d_out:
        raise ValueError(
            f"out is {tuple(out.shape)}, expected {plan.num_tokens} tokens (the plan's) of"
            f" {d_out} features (lora_B's): pass the output of the linear for the same x"
        )
    if not out.is_floating_point() or out.device != h.device:
        raise TypeError(
            f"out is {out.dtype} on {out.device}, expected floating point on {h.device}:"
            " pass the output of the linear for the same x"
        )
