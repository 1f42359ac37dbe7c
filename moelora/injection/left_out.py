"""What of a base has no experts though a user may think so, and why."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from torch import nn
from transformers.utils import logging

from ..host_internals import Convolution
from .modules import nearest
from .probe import NOT_CALLED

logger = logging.get_logger(__name__)

FUSED = "the base's own experts in one parameter of three or more dimensions, which is not a linear"


def with_ancestors(names: Iterable[str]) -> list[str]:
    """These modules and all that they are in, by name."""
    parts = [name.split(".") for name in names]
    around = [".".join(own[:end]) for own in parts for end in range(1, len(own) + 1)]
    return list(dict.fromkeys(around))


def why_not_called(name: str, called: Collection[str]) -> str:
    """Why a forward pass of text, which called the modules `called`, did not call module `name`."""
    parts = name.split(".")
    if len(parts) == 1 or ".".join(parts[:-1]) in called:
        return NOT_CALLED
    # Lists of modules are not called themselves, but what is in them.
    inside = max((i for i in range(len(parts)) if ".".join(parts[:i]) in called), default=0)
    return f"a forward pass of text does not reach {'.'.join(parts[: inside + 1])}"


def fused_experts(model: nn.Module) -> dict[str, int]:
    """The size of each parameter that holds the linears of several experts of the base, by name."""
    return {
        f"{path}.{name}": parameter.numel()
        for path, module in model.named_modules()
        if not isinstance(module, Convolution)
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.dim() >= 3 and min(parameter.shape) > 1
    }


def report_fused(model: nn.Module, fused: dict[str, int]) -> None:
    """Say how much of a base of its own experts has none of ours."""
    if fused:
        share = sum(fused.values()) / sum(p.numel() for p in model.parameters())
        logger.warning(
            f"{share:.0%} of the parameters of this {type(model).__name__} are its own experts, "
            f"fused into parameters such as {next(iter(fused))}: they are not adapted, and listed "
            "in model.moelora.unadapted. The experts of this mixture are on its linears alone."
        )


def check_all_match(model: nn.Module, targets: Iterable[str]) -> None:
    """Raise ValueError unless each of the names of target_modules is one of a module."""
    names = [name for name, _ in model.named_modules() if name]
    ends = {name[i:] for name in names for i in _beginnings(name)}
    missing = sorted(set(targets) - ends)
    if not missing:
        return
    fused = list(fused_experts(model))
    inside = f" Its own experts are parameters ({fused[0]} …), not linears." if fused else ""
    raise ValueError(
        f"target_modules names {', '.join(map(repr, missing[:4]))}, which matches no module of "
        f"{type(model).__name__}: leave it out. {nearest(missing[:1], names)}{inside}"
    )


def _beginnings(name: str) -> list[int]:
    """Where the parts of a dotted name begin."""
    return [0, *(i + 1 for i, letter in enumerate(name) if letter == ".")]
