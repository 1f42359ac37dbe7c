"""Experts beside a block of the base that is more than one linear: a module, or a span of modules
from a first to a last one, as an FFN that is not a module of its own.

The experts read what goes in and are added to what comes out (arXiv:2110.04366), in series what
comes out already (arXiv:1902.00751).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .forward_pass import current_pass
from .linear import Site


class BlockHook:
    """Forward hook of an adapted block: its site adds the experts' part to its output."""

    handle: RemovableHandle

    def __init__(self, site: Site, index: int, block: nn.Module):
        self.site = site
        self.index = index
        self.handle = block.register_forward_hook(self, with_kwargs=True)

    def __call__(self, block: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> Tensor:
        x = output if self.site.is_series else read_by(args, kwargs)
        if not isinstance(output, Tensor) or x is None:
            raise TypeError(
                f"{self.site.names[self.index]} gave a {type(output).__name__}, and one tensor "
                "when its experts were put in: leave out what makes it give more, or adapt its "
                "linears instead."
            )
        # Not in place: a block may hand out what it or another module keeps.
        return self.site(x, output, self.index, False)


class SpanBegin:
    """Forward hook of a span's first module: the pass keeps what it read for the last one."""

    handle: RemovableHandle

    def __init__(self, site: Site, index: int, first: nn.Module):
        self.site = site
        self.index = index
        # Not a pre-hook: another one after it may change the input.
        self.handle = first.register_forward_hook(self, with_kwargs=True)

    def __call__(self, first: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        x = read_by(args, kwargs)
        if x is not None:
            current_pass(self.site.context).read[self.site.names[self.index]] = x


class SpanEnd:
    """Forward hook of a span's last module: its site adds the experts' part to its output."""

    handle: RemovableHandle

    def __init__(self, site: Site, index: int, last: nn.Module):
        self.site = site
        self.index = index
        self.handle = last.register_forward_hook(self)

    def __call__(self, last: nn.Module, args: tuple, output: Tensor) -> Tensor:
        name = self.site.names[self.index]
        x = current_pass(self.site.context).read.pop(name, None)
        if x is None:
            raise RuntimeError(
                f"{name}: the last module was called without the first one in the same forward "
                "pass of the model. Call the model itself, not one of its parts."
            )
        return self.site(x, output, self.index, False)


def read_by(args: tuple, kwargs: Mapping[str, Any]) -> Tensor | None:
    """What a module reads: its first argument, by place or by name; None if that is no tensor.

    Args:
        args: of the call.
        kwargs: of the call.
    """
    x = args[0] if args else kwargs.get("hidden_states", next(iter(kwargs.values()), None))
    return x if isinstance(x, Tensor) else None
