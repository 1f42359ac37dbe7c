"""Gradient checkpointing: a recomputed layer sees the routing of the forward pass that it belongs
to.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .mixture import Mixture


class RoutedCheckpoint:
    """Wraps the checkpoint function that transformers hands to the decoder layers.

    Two things that a layer reads are no arguments of it: the state of the forward pass, which is
    gone when the backward pass recomputes, and the routing that its layer or model shares. The
    state is kept here; the routing's weights (and forced ones that learn) become an explicit input,
    since reentrant checkpointing carries gradients to inputs alone.
    """

    def __init__(self, mixture: Mixture, checkpoint: Callable):
        self.mixture = mixture
        self.checkpoint = checkpoint

    def __call__(self, function: Callable, *args: Any, **kwargs: Any) -> Any:
        mixture, state = self.mixture, self.mixture.state
        if state is None:
            return self.checkpoint(function, *args, **kwargs)
        if state.routing_only:
            # Its results are routings, not outputs of the layer: a reentrant checkpoint would cut
            # them off.
            return function(*args)
        shared = state.shared
        weights = None if shared is None else shared[1].weights
        forced = (
            state.forcing.expert_weights
            if state.forcing is not None and state.forcing.learns
            else None
        )
        device = next((a.device for a in args if isinstance(a, Tensor)), None)
        # Reentrant checkpointing drops a layer none of whose inputs needs a gradient, as the first
        # one's over a frozen embedding: its experts would silently not train.
        anchor = torch.zeros((), device=device, requires_grad=True)

        def run(anchor: Tensor, weights: Tensor | None, forced: Tensor | None, *args: Any) -> Any:
            if shared is not None and weights is not None:
                state.shared = mixture.with_weights(shared, weights)
            with mixture.resumed(state), state.forced_by(forced):
                return function(*args)

        return self.checkpoint(run, anchor, weights, forced, *args, **kwargs)
