"""Places for experts that are no linears: whole blocks, and spans of modules, of which sizes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import Tensor, nn

from ..config import MoeLoraConfig
from ..placement import SPAN, ends_of
from .modules import decoder_layer, ending_in, features, is_in_layers, nearest
from .probe import NOT_CALLED, Call

Sizes = tuple[int, int]


def find_blocks(model: nn.Module, config: MoeLoraConfig) -> list[str]:
    """The blocks and spans that target_blocks names, by full name and in the model's order.

    Raises:
        ValueError: a name that no module has, a linear, or a span that is none.
    """
    layers = config.layers_to_transform
    found = []
    for target in config.target_blocks or []:
        first, last = ends_of(target)
        heads = [name for name in ending_in(model, first) if is_in_layers(model, name, layers)]
        if not heads:
            raise ValueError(_nothing_matched(model, config, first))
        found += [_checked_block(model, name, first, last) for name in heads]
    order = {name: place for place, (name, _) in enumerate(model.named_modules())}
    return sorted(dict.fromkeys(found), key=lambda name: order[ends_of(name)[0]])


def _checked_block(model: nn.Module, head: str, first: str, last: str) -> str:
    """The full name of a block, or of the span that begins with it."""
    module = model.get_submodule(head)
    if head == decoder_layer(model, head):
        raise ValueError(_refused(head, "it is a whole decoder layer: name modules inside of it"))
    if first == last:
        if features(module) is not None:
            raise ValueError(
                f"target_blocks names {head!r}, a {type(module).__name__}, which is a linear: name "
                "it in target_modules."
            )
        return head
    tail = head.removesuffix(first) + last
    try:
        model.get_submodule(tail)
    except AttributeError:
        raise ValueError(
            f"target_blocks names '{first}{SPAN}{last}': there is {head!r}, but no {tail!r} beside "
            "it."
        ) from None
    inside = f"{tail}.".startswith(f"{head}.") or f"{head}.".startswith(f"{tail}.")
    if inside or decoder_layer(model, head) != decoder_layer(model, tail):
        raise ValueError(
            f"target_blocks names '{first}{SPAN}{last}': {head!r} and {tail!r} are not two modules "
            "of one decoder layer after another."
        )
    return f"{head}{SPAN}{tail}"


def block_sizes(
    model: nn.Module, config: MoeLoraConfig, blocks: Iterable[str], calls: Sequence[Call]
) -> dict[str, list[int]]:
    """For each block how wide what its experts read is, and what they add to, by a probe's calls.

    Raises:
        ValueError: a block that does not read and give one tensor with a row a token.
    """
    is_series = config.expert_placement == "series"
    return {name: list(_size_of_block(model, name, calls, is_series)) for name in blocks}


def sizes_of(model: nn.Module, config: MoeLoraConfig, names: Iterable[str]) -> dict[str, Sizes]:
    """For each adapted linear and block how wide what its experts read is, and what they add to.

    Raises:
        ValueError: one that is neither a linear nor what target_blocks names.
    """
    modules = dict(model.named_modules())
    blocks = find_blocks(model, config)
    known = config.block_sizes or {}
    is_series = config.expert_placement == "series"
    sizes = {}
    for name in names:
        if name in blocks and name in known:
            d_in, d_out = known[name]
            sizes[name] = (d_in, d_out)
            continue
        size = features(modules[name]) if name in modules else None
        if size is None:
            raise ValueError(
                f"The checkpoint's experts belong to {name!r}, which is not a linear of this "
                f"{type(model).__name__}."
            )
        sizes[name] = (size[1], size[1]) if is_series else size
    return sizes


def _size_of_block(model: nn.Module, name: str, calls: Sequence[Call], is_series: bool) -> Sizes:
    """(d_in, d_out) of a block, in series (d_out, d_out); ValueError where experts cannot be there,
    with the reason.
    """
    first, last = ends_of(name)
    begun = [(place, call) for place, call in enumerate(calls) if call.name == first]
    ended = [(place, call) for place, call in enumerate(calls) if call.name == last]
    if not begun or not ended:
        raise ValueError(_refused(name, NOT_CALLED))
    y = ended[0][1].output
    x = y if is_series else begun[0][1].x
    once_in_order = len(begun) == len(ended) == 1 and begun[0][0] < ended[0][0]
    if first != last and not once_in_order:
        reason = (
            f"its ends are not called once and one after the other ({len(begun)}, {len(ended)})"
        )
    elif not isinstance(y, Tensor) or not y.is_floating_point():
        reason = f"it gives a {type(y).__name__}, and one tensor of hidden states was expected"
    elif not isinstance(x, Tensor) or not x.is_floating_point() or x.dim() < 2:
        reason = "its first input is no tensor of hidden states"
    elif x.shape[:-1].numel() != y.shape[:-1].numel():
        reason = f"it reads {tuple(x.shape)} and gives {tuple(y.shape)}: not a row for each token"
    elif next(model.get_submodule(last).parameters(), None) is None:
        reason = "it has no weights, by which experts know where they are: name a module around it"
    else:
        return x.shape[-1], y.shape[-1]
    raise ValueError(_refused(name, reason))


def _refused(name: str, reason: str) -> str:
    return f"target_blocks names {name!r}, which cannot be adapted: {reason}."


def _nothing_matched(model: nn.Module, config: MoeLoraConfig, name: str) -> str:
    names = [name for name, _ in model.named_modules()]
    layers = config.layers_to_transform
    where = "" if layers is None else f" in layers {layers}"
    return (
        f"target_blocks names {name!r}{where}, which is no module of {type(model).__name__}. "
        f"{nearest([name], names)}"
    )
