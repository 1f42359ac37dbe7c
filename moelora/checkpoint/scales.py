"""What a fingerprint knows of a quantised weight: the scales of its blocks, which follow from the
largest weights there, and so are the same wherever it was quantised.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .. import host_internals
from ..host_internals import QUANTISED_STATE


def scales_of(linear: nn.Module, weight: Tensor) -> tuple[str, Tensor]:
    """How a quantised weight was quantised, and the scales of its blocks; of a kind that is not
    known here no scales.

    Only scales of the same kind mean the same.

    Args:
        linear: whose weight it is.
        weight: the weight.
    """
    scales = torch.empty(0) if weight.is_meta else _scales(linear, weight)
    kind = f"{type(weight).__name__} of {scales.numel()} scales"
    nested = getattr(getattr(weight, QUANTISED_STATE, None), "nested", False)
    return kind + (", nested" if nested else ""), scales


def _scales(linear: Any, weight: Any) -> Tensor:
    if hasattr(weight, "__tensor_flatten__"):
        # quanto's and torchao's: codes, scales and shifts in one tensor.
        parts = [getattr(weight, name) for name in weight.__tensor_flatten__()[0]]
        floats = [part.reshape(-1) for part in parts if part.is_floating_point()]
        return torch.cat(floats) if floats else torch.empty(0)
    state = getattr(weight, QUANTISED_STATE, None)
    if state is not None:
        # bitsandbytes, 4 bits: the scales may be quantised themselves.
        if not state.nested:
            return state.absmax.reshape(-1)
        return host_internals.dequantize_blockwise(state.absmax, state.state2) + state.offset
    # bitsandbytes, 8 bits: the first forward takes them to another place.
    for owner in (weight, getattr(linear, "state", None)):
        scales = getattr(owner, "SCB", None)
        if isinstance(scales, Tensor):
            return scales.reshape(-1)
    return torch.empty(0)
