"""Gradient checkpointing: a layer that is computed again sees its own forward pass."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..host_internals import CHECKPOINT_FUNCTION, checkpoint_functions
from .context import MixtureContext
from .forward_pass import running_pass


class RoutedCheckpoint:
    """Wraps the checkpoint function that transformers hands to the decoder layers.

    Two things that a layer reads are not arguments of it: the forward pass, which has ended when
    the backward pass computes the layer again, and the routing that its layer or model shares. The
    pass is kept here; the routing's weights (and those of an override, or an outside context, that
    learn) become explicit inputs, since reentrant checkpointing carries gradients to inputs alone.
    """

    def __init__(self, context: MixtureContext, checkpoint: Callable):
        self.context = context
        self.checkpoint = checkpoint

    def __call__(self, function: Callable, *args: Any, **kwargs: Any) -> Any:
        running = running_pass(self.context)
        if running is None:
            return self.checkpoint(function, *args, **kwargs)
        if running.routing_only:
            # Its results are routings, not outputs of the layer: a reentrant checkpoint would cut
            # them off.
            return function(*args)
        shared = running.shared
        weights = None if shared is None else shared.weights
        override = running.override
        forced = override.expert_weights if override is not None and override.learns else None
        outside = running.router_context
        outside = outside if outside is not None and outside.requires_grad else None
        device = next((arg.device for arg in args if isinstance(arg, Tensor)), None)
        # Reentrant checkpointing drops a layer none of whose inputs needs a gradient, as the first
        # one's over a frozen embedding: its experts would silently not train.
        anchor = torch.zeros((), device=device, requires_grad=True)

        def run(anchor: Tensor, weights: Any, forced: Any, outside: Any, *args: Any) -> Any:
            given = None if shared is None else replace(shared, weights=weights)
            layer = replace(running, shared=given, shrunk={}, read={})
            if override is not None and forced is not None:
                layer.override = replace(override, expert_weights=forced)
            if outside is not None:
                layer.router_context = outside
            outputs = layer.run(lambda: function(*args))
            if layer.shared is not given and not running.closed:
                # Some versions of transformers checkpoint a layer with its hooks, so its router
                # runs inside of it.
                if self.context.config.router_scope == "model" and not torch.is_grad_enabled():
                    raise ValueError(
                        "router_scope='model' does not learn under reentrant gradient "
                        "checkpointing with this version of transformers: pass "
                        "gradient_checkpointing_kwargs={'use_reentrant': False}, or upgrade "
                        "transformers."
                    )
                running.shared = layer.shared
            return outputs

        return self.checkpoint(run, anchor, weights, forced, outside, *args, **kwargs)


def wrap(model: nn.Module, context: MixtureContext | None) -> None:
    """Wrap the checkpoint functions that `model` and its layers hold already; None unwraps them."""
    for module in checkpoint_functions(model):
        function = getattr(module, CHECKPOINT_FUNCTION)
        own = function.checkpoint if isinstance(function, RoutedCheckpoint) else function
        wrapped = own if context is None else RoutedCheckpoint(context, own)
        setattr(module, CHECKPOINT_FUNCTION, wrapped)
