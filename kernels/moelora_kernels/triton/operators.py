"""The kernels as functions of tensors and a `Job`: run at once, or as torch operators in a graph.

Each has one implementation. Where torch.compile traces, or tensors are fake, the operator
`moelora::NAME` stands for it, with its shapes for tracing; else it runs directly, for an operator's
dispatch costs more than a launch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op
from torch.nn import Parameter

from ..plan import TopK
from .decode import decode_expand as run_decode_expand
from .decode import decode_shrink as run_decode_shrink
from .decode import decode_splits
from .expand import expand as run_expand
from .gate_grad import gate_grad
from .job import Job, unflatten
from .matmul import add_product, gated, product
from .matmul import poisoned as run_poisoned
from .matmul import screened as run_screened
from .router import product as run_router_product
from .router import route
from .router import weight_grad as run_router_grad
from .routing import logits_width
from .shrink import shrink_planes
from .weight_grad import weight_grad as run_weight_grad

JOB = "Tensor[] tables, SymInt[] sizes, str path, str tiles"


class Operator:
    """A function of tensors, numbers and perhaps a job; called, it takes the shorter of two ways.

    Args:
        schema: arguments and results in torch's notation, with {JOB} for the job.
        run: the function; its last argument is the job, where the schema has one.
        fake: the same for tensors without values.
        mutates: the arguments that it writes into.
    """

    def __init__(self, name: str, schema: str, run: Callable, fake: Callable, mutates: tuple = ()):
        self.run = run
        self.name = name
        self.has_job = "{JOB}" in schema
        self.op = custom_op(
            f"moelora::{name}",
            self._without_job(run),
            mutates_args=mutates,
            schema=schema.replace("{JOB}", JOB),
        )
        self.op.register_fake(self._without_job(fake))

    def __call__(self, *args: Any) -> Any:
        first = args[0]
        if in_graph(first):
            return self.op(*args[:-1], *args[-1].flat()) if self.has_job else self.op(*args)
        with device_of(first):
            return self.run(*args)

    def _without_job(self, function: Callable) -> Callable:
        """The function with the job as the arguments of an operator."""
        if not self.has_job:
            return lambda *args: function(*args)
        return lambda *args: function(*args[:-4], unflatten(*args[-4:]))


def in_graph(tensor: Tensor) -> bool:
    """Whether a compiler traces, or tensors have no values: the operator stands for the kernel."""
    return (
        torch.compiler.is_compiling() or type(tensor) not in (Tensor, Parameter) or tensor.is_meta
    )


def device_of(tensor: Tensor) -> Any:
    """Triton launches on the current device, which need not be the tensor's: make it that one."""
    if tensor.is_cuda and tensor.device.index != torch.cuda.current_device():
        return torch.cuda.device(tensor.device)
    return nullcontext()


def dense_rows(tensor: Tensor) -> Tensor:
    """The tensor with its last axis side by side, as the kernels read it; other strides stay."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _shrink(x: Tensor, factor: Tensor, job: Job) -> Tensor:
    if job.path == "matmul":
        return product(x, factor.T, torch.float32)
    planes = shrink_planes(dense_rows(x), factor.contiguous(), job)
    return planes[0] if planes.shape[0] == 1 else planes.sum(0)


def _input_grad(dh: Tensor, factor: Tensor, dtype: torch.dtype, job: Job) -> Tensor:
    if job.path == "matmul":
        return product(dh, factor, dtype)
    return run_expand(dense_rows(dh), factor.contiguous(), None, None, dtype, job)


def _weight_grad(h: Tensor, x: Tensor, dtype: torch.dtype, job: Job) -> Tensor:
    if job.path == "matmul":
        return product(h.T, x, dtype)
    return run_weight_grad(dense_rows(h), dense_rows(x), job, dtype)


def _expand(
    h: Tensor,
    lora_B: Tensor,
    poison: Tensor | None,
    weights: Tensor,
    out: Tensor | None,
    dtype: torch.dtype,
    job: Job,
    y: Tensor | None = None,
) -> Tensor:
    weights = weights.contiguous()
    if poison is not None:
        return add_product(gated(dense_rows(h), weights, poison, dtype, job), lora_B, out, y)
    if out is not None and y is None:
        out = dense_rows(out)
    return run_expand(dense_rows(h), lora_B.contiguous(), out, weights, dtype, job, y)


def _expand_inplace(
    h: Tensor, lora_B: Tensor, poison: Tensor | None, weights: Tensor, out: Tensor, job: Job
) -> None:
    _expand(h, lora_B, poison, weights, out, out.dtype, job, out)


def _expand_backward(
    dy: Tensor, h: Tensor, lora_B: Tensor, weights: Tensor, job: Job
) -> tuple[Tensor, Tensor, Tensor]:
    h = dense_rows(h)
    if job.path == "matmul":
        planes = product(dy, lora_B.T, torch.float32).unsqueeze(0)
    else:
        by_linear = job._replace(num_linears=1)
        planes = shrink_planes(dense_rows(dy), lora_B.contiguous(), by_linear)
        planes = planes if job.masked else planes.squeeze(3)
    return gate_grad(planes, h, weights.contiguous(), dy.dtype, job)


def _fake_screened(factor, dtype):
    rows = 0 if factor.dtype == dtype else factor.shape[0]
    return (
        factor.new_empty((rows, factor.shape[1]), dtype=dtype),
        factor.new_empty(factor.shape, dtype=dtype),
        factor.new_empty(factor.shape[0], dtype=torch.float32),
    )


screened = Operator(
    "screened",
    "(Tensor factor, ScalarType dtype) -> (Tensor, Tensor, Tensor)",
    run_screened,
    _fake_screened,
)
"""For path "matmul": (factor in dtype, or nothing where it is; the same with 0 where it is not
finite; [R] fp32, NaN for the rows where).
"""

poisoned = Operator(
    "poisoned",
    "(Tensor dh, Tensor poison, ScalarType dtype) -> Tensor",
    lambda dh, poison, dtype: run_poisoned(dense_rows(dh), poison, dtype),
    lambda dh, poison, dtype: dh.new_empty(dh.shape, dtype=dtype),
)
"""For path "matmul": dh in dtype, NaN for the tokens that chose a row that is not finite."""

shrink = Operator(
    "shrink",
    "(Tensor x, Tensor factor, {JOB}) -> Tensor",
    _shrink,
    lambda x, factor, job: x.new_empty(job.h_shape(x.shape[0]), dtype=torch.float32),
)
"""h = x Fᵀ fp32 of all linears of a site: of all experts [T, R], else [T, K, L, max rank]."""

input_grad = Operator(
    "input_grad",
    "(Tensor dh, Tensor factor, ScalarType dtype, {JOB}) -> Tensor",
    _input_grad,
    lambda dh, factor, dtype, job: dh.new_empty((dh.shape[0], factor.shape[1]), dtype=dtype),
)
"""dx = Σ_l dh_l A_l [T, d_in] of dtype."""

weight_grad = Operator(
    "weight_grad",
    "(Tensor h, Tensor x, ScalarType dtype, {JOB}) -> Tensor",
    _weight_grad,
    lambda h, x, dtype, job: x.new_empty((job.total_rank, x.shape[1]), dtype=dtype),
)
"""hᵀ x, stacked as the factor, [R, d] of dtype."""

expand = Operator(
    "expand",
    "(Tensor h, Tensor lora_B, Tensor? poison, Tensor weights, Tensor? out, ScalarType dtype,"
    " {JOB}) -> Tensor",
    _expand,
    lambda h, B, poison, weights, out, dtype, job: h.new_empty(
        (h.shape[0], B.shape[1]), dtype=dtype
    ),
)
"""out + Σ_e w_e s_e h_e B_e, [T, d_out] of dtype; lora_B and poison of `screened` on "matmul"."""

expand_ = Operator(
    "expand_",
    "(Tensor h, Tensor lora_B, Tensor? poison, Tensor weights, Tensor(a!) out, {JOB}) -> ()",
    _expand_inplace,
    lambda h, lora_B, poison, weights, out, job: None,
    ("out",),
)
"""`expand` into out."""

expand_backward = Operator(
    "expand_backward",
    "(Tensor dy, Tensor h, Tensor lora_B, Tensor weights, {JOB}) -> (Tensor, Tensor, Tensor)",
    _expand_backward,
    lambda dy, h, lora_B, weights, job: (
        h.new_empty(h.shape),
        h.new_empty(h.shape, dtype=dy.dtype),
        weights.new_empty(weights.shape),
    ),
)
"""(dh, g·s·h in the dtype of dy, dweights) of u = dy Bᵀ."""


def _decode_shrink(x: Tensor, router: Tensor, lora_A: Tensor, input_norm: bool, job: Job) -> Tensor:
    return run_decode_shrink(
        dense_rows(x), TopK(router.contiguous(), input_norm=input_norm), lora_A.contiguous(), job
    )


def _fake_decode_shrink(x, router, lora_A, input_norm, job):
    width = logits_width(TopK(router, input_norm=input_norm))
    splits = decode_splits(x, width, lora_A.shape[0], job.tiles)[2]
    return router.new_empty((splits, x.shape[0], width + lora_A.shape[0]))


decode_shrink = Operator(
    "decode_shrink",
    "(Tensor x, Tensor router, Tensor lora_A, bool input_norm, {JOB}) -> Tensor",
    _decode_shrink,
    _fake_decode_shrink,
)
"""fp32 planes [splits, T, logits x Wᵀ, and from `logits_width` on h = x Aᵀ of all linears]."""


def _decode_expand(planes: Tensor, lora_B: Tensor, *router_and_rest: Any) -> None:
    *router, ids, weights, y, add, job = router_and_rest
    run_decode_expand(planes, lora_B.contiguous(), TopK(*router), ids, weights, y, add, job)


decode_expand_ = Operator(
    "decode_expand_",
    "(Tensor planes, Tensor lora_B, Tensor router, Tensor? bias, bool norm, bool null_expert,"
    " bool input_norm, Tensor(a!) ids, Tensor(b!) weights, Tensor(c!) y, bool add, {JOB}) -> ()",
    _decode_expand,
    lambda *arguments: None,
    ("ids", "weights", "y"),
)
"""y (+)= (g·s·h) B for one linear, whose h is the last columns of the planes; the routing by the
logits before is written to ids and weights [T, K]. Of the router itself only the shape is read.
"""


def _fake_top_k(x, router, bias, norm, null_expert, input_norm, num_slots):
    ids = x.new_empty((x.shape[0], num_slots), dtype=torch.int64)
    experts = torch.empty_like(ids) if null_expert else ids.new_empty(0)
    return ids, router.new_empty((x.shape[0], num_slots)), experts


router_top_k = Operator(
    "router_top_k",
    "(Tensor x, Tensor router, Tensor? bias, bool norm, bool null_expert, bool input_norm,"
    " int num_slots) -> (Tensor, Tensor, Tensor)",
    lambda x, *router_and_slots: route(x, TopK(*router_and_slots[:-1]), router_and_slots[-1]),
    _fake_top_k,
)
"""(ids, weights, slot_experts) [T, K] of `router.route`."""

router_product = Operator(
    "router_product",
    "(Tensor x, Tensor weight) -> Tensor",
    run_router_product,
    lambda x, weight: weight.new_empty((x.shape[0], weight.shape[0])),
)
"""x Wᵀ [T, E] fp32."""

router_grad = Operator(
    "router_grad",
    "(Tensor dlogits, Tensor x) -> Tensor",
    run_router_grad,
    lambda dlogits, x: dlogits.new_empty((dlogits.shape[1], x.shape[1])),
)
"""dlogitsᵀ x [E, d] fp32."""

OPERATORS: Sequence[Operator] = (
    screened,
    poisoned,
    shrink,
    input_grad,
    weight_grad,
    expand,
    expand_,
    expand_backward,
    decode_shrink,
    decode_expand_,
    router_top_k,
    router_product,
    router_grad,
)
