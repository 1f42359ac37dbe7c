"""vLLM's linears with experts: where each linear of the mixture is, and what adds to its output."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    LinearBase,
    LinearMethodBase,
    RowParallelLinear,
)

from ..core.forward_pass import current_pass
from ..core.linear import Site

OPERATORS = torch.library.Library("moelora_vllm", "DEF")


@dataclass(frozen=True)
class Place:
    """Where a linear of the mixture is in vLLM's model.

    Args:
        where: the name of vLLM's linear, which may be several of the mixture's in one.
        layer: that linear.
        columns: which columns of its output on this process are this linear's.
        inputs: which columns of the whole lora_A are this process's.
        outputs: which columns of the whole lora_B are.
        is_fused: the mixture has one linear where vLLM's has several sections.
    """

    where: str
    layer: LinearBase
    columns: slice
    inputs: slice
    outputs: slice
    is_fused: bool = False

    @property
    def is_split(self) -> bool:
        """Whether each process reads a part of the input."""
        return isinstance(self.layer, RowParallelLinear) and self.layer.tp_size > 1


def find_place(name: str, modules: dict[str, nn.Module], packed: dict[str, list[str]]) -> Place:
    """The place of a linear.

    Args:
        name: its full name in transformers.
        modules: of vLLM's model, by name.
        packed: which linears vLLM's model makes one of, by the name of that one.

    Raises:
        ValueError: vLLM's model has no linear for it.
    """
    stem, _, leaf = name.rpartition(".")
    for merged, leaves in packed.items():
        where = f"{stem}.{merged}"
        layer = modules.get(where)
        if leaf in leaves and len(leaves) > 1 and isinstance(layer, LinearBase):
            return _place(where, layer, leaves.index(leaf))
    layer = modules.get(name)
    if not isinstance(layer, LinearBase):
        kind = type(layer).__name__ if name in modules else "nothing"
        raise ValueError(
            f"vLLM cannot serve the experts of {name!r}: where transformers has this linear, its "
            f"model has {kind}. Experts of routed experts, of heads and of embeddings are not "
            "served: train a mixture with target_modules that name attention and MLP linears, or "
            "try additional_config={'moelora': {'transformers_backend': true}}."
        )
    return _place(name, layer, None)


def _place(where: str, layer: LinearBase, shard: int | None) -> Place:
    """The place of shard number `shard` of a linear, or of all of it."""
    sizes = list(getattr(layer, "output_partition_sizes", [layer.output_size]))
    size = getattr(layer, "tp_size", 1)
    rank = getattr(layer, "tp_rank", 0)
    start = 0 if shard is None else sum(sizes[:shard])
    width = sum(sizes) if shard is None else sizes[shard]
    columns = slice(start, start + width)
    inputs = outputs = slice(None)
    if isinstance(layer, RowParallelLinear) and size > 1:
        part = layer.input_size_per_partition
        inputs = slice(rank * part, (rank + 1) * part)
    elif isinstance(layer, ColumnParallelLinear) and size > 1:
        if shard is None and len(sizes) > 1:
            raise ValueError(
                f"vLLM cuts {where!r} into {size} parts of each of its {len(sizes)} sections, and "
                "the experts know one linear: use tensor_parallel_size=1."
            )
        # Keys and values of few heads are the same in several processes.
        own = rank // (getattr(layer, "num_kv_head_replicas", 1) if shard else 1)
        outputs = slice(own * width, (own + 1) * width)
    if getattr(layer, "gather_output", False) and size > 1:
        raise ValueError(
            f"vLLM gathers the output of {where!r} from {size} processes: use "
            "tensor_parallel_size=1 for this base."
        )
    return Place(where, layer, columns, inputs, outputs, shard is None and len(sizes) > 1)


class WithExperts(LinearMethodBase):
    """What a linear's own method gives, and what the experts add; before any all-reduce.

    Args:
        inner: the linear's own method, quantised or not.
        key: by which the operator finds this one, among what vLLM keeps for a forward pass.
        order: `[1]`, written by routers of layers and read here, so that a compiler keeps the
            order.
    """

    def __init__(self, inner: LinearMethodBase, key: str, order: Tensor):
        self.inner = inner
        self.key = key
        self.order = order
        self.parts: list[tuple[Site, int, slice]] = []
        self.was_called = False

    def __getattr__(self, name: str) -> Any:
        # What vLLM asks of a kind of quantisation.
        if name in ("inner", "parts"):
            raise AttributeError(name)
        return getattr(self.inner, name)

    @property
    def supports_pre_processed_weights(self) -> bool:  # type: ignore[override]
        """As the linear's own method."""
        return self.inner.supports_pre_processed_weights

    @property
    def requires_device_loading(self) -> bool:  # type: ignore[override]
        """As the linear's own method."""
        return self.inner.requires_device_loading

    def create_weights(self, *args: Any, **kwargs: Any) -> Any:
        """As the linear's own method.

        Args:
            args, kwargs: its.
        """
        return self.inner.create_weights(*args, **kwargs)

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """As the linear's own method.

        Args:
            layer: the linear.
        """
        self.inner.process_weights_after_loading(layer)

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """The linear's output with its experts' part.

        Args:
            layer: the linear.
            x: `[…, d_in]`.
            bias: of the linear.
        """
        y = self.inner.apply(layer, x, bias)
        if torch.compiler.is_compiling():
            torch.ops.moelora_vllm.add_experts(x, y, self.order, self.key)
        else:
            self.add(x, y)
        return y

    def add(self, x: Tensor, y: Tensor) -> None:
        """Add the experts' part.

        Args:
            x: what the linear read, `[…, d_in]`.
            y: what it gave, `[…, Σ d_out]`; written in place.
        """
        self.was_called = True
        x = x.reshape(-1, x.shape[-1])
        y = y.view(-1, y.shape[-1])
        for site, index, columns in self.parts:
            output = y[:, columns]
            read = output if site.is_series else x
            # Kernels that can write into some columns of y do.
            added = site(read, output, index, not site.is_series)
            if added is not output:
                output.copy_(added)


class RouteLayer:
    """Forward pre-hook of a decoder layer: the router of scopes "layer" and "model".

    Args:
        site: by which its pass knows the mixture.
        index: the router's number.
        key, order: as of `WithExperts`.
        names: the parameters of the layer's forward.
    """

    def __init__(self, context: Any, index: int, key: str, order: Tensor, names: tuple[str, ...]):
        self.context = context
        self.index = index
        self.key = key
        self.order = order
        self.names = names
        self.was_called = False

    def __call__(self, layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        given = dict(zip(self.names, args), **kwargs)
        hidden = given["hidden_states"]
        residual = given.get("residual")
        # vLLM's layers leave the sum to the next layer's norm.
        hidden = hidden if residual is None else hidden + residual
        if torch.compiler.is_compiling():
            torch.ops.moelora_vllm.route_layer(hidden, self.order, self.key)
        else:
            self.route(hidden)

    def route(self, hidden: Tensor) -> None:
        """Route the layer's input.

        Args:
            hidden: `[…, d]`.
        """
        self.was_called = True
        router = self.context.router_list[self.index]
        hidden = hidden.reshape(-1, hidden.shape[-1])
        current_pass(self.context).share(self.index, router, hidden)


def _known(key: str) -> Any:
    return get_forward_context().no_compile_layers[key]


def _add_experts(x: Tensor, y: Tensor, order: Tensor, key: str) -> None:
    _known(key).add(x, y)


def _route_layer(hidden: Tensor, order: Tensor, key: str) -> None:
    _known(key).route(hidden)


def _nothing(*args: Any) -> None:
    return None


def _define(signature: str, function: Any) -> None:
    """An operator that a compiler does not look into: what depends on the number of tokens and on
    the requests is decided when it runs.
    """
    name = signature.partition("(")[0]
    OPERATORS.define(signature, tags=(torch.Tag.pt2_compliant_tag,))
    OPERATORS.impl(name, function, "CompositeExplicitAutograd")
    OPERATORS._register_fake(name, _nothing)


_define("add_experts(Tensor x, Tensor(a!) y, Tensor order, str key) -> ()", _add_experts)
_define("route_layer(Tensor hidden, Tensor(a!) order, str key) -> ()", _route_layer)
