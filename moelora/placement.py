"""What experts are beside LoRA: a nonlinearity between their halves, where they read, and whole
blocks of the base as their places.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import takewhile
from typing import Any

from .validation import check_choice, check_type, string_list

# φ(0) = 0 for each: what pads smaller ranks in the kernels stays 0.
ACTIVATIONS = ("relu", "gelu", "silu", "tanh")
PLACEMENTS = ("parallel", "series")
# Between the first and the last module of a block that is not a module of its own.
SPAN = "->"


def ends_of(name: str) -> tuple[str, str]:
    """The modules whose input is read and to whose output is added; of most places the same one.

    Args:
        name: the full name of a linear or block, or "first->last" of a span.
    """
    first, _, last = name.partition(SPAN)
    return first, last or first


def site_name(name: str) -> str:
    """What a site that begins with this place is called: the span "x.a->x.b" is "x.a-to-b".

    Args:
        name: as in `ends_of`.
    """
    first, last = ends_of(name)
    if first == last:
        return name
    parts = last.split(".")
    shared = takewhile(lambda pair: pair[0] == pair[1], zip(first.split("."), parts))
    return f"{first}-to-{'.'.join(parts[len(list(shared)) :])}"


def check_placement(values: Mapping[str, Any]) -> None:
    """Raise ValueError or TypeError for a form of experts that there is not.

    Args:
        values: of the fields expert_activation, expert_placement, target_blocks, block_sizes and
            expert_init.
    """
    check_block_sizes(values["block_sizes"])
    if values["expert_activation"] is not None:
        check_choice("expert_activation", values["expert_activation"], ACTIVATIONS)
    check_choice("expert_placement", values["expert_placement"], PLACEMENTS)
    beside = values["expert_placement"] != "parallel" or values["target_blocks"]
    if values["expert_init"] == "svd" and beside:
        raise ValueError(
            "expert_init='svd' takes the directions that a linear's weight reads, and in series or "
            "beside a block experts read something else: use 'orthogonal' or 'kaiming'."
        )
    for target in values["target_blocks"] or []:
        ends = target.split(SPAN)
        if len(ends) > 2 or not all(end and end == end.strip() for end in ends):
            raise ValueError(
                f"target_blocks names {target!r}; expected the name of a module, or of the first "
                f"and the last of several as 'fc1{SPAN}fc2'."
            )
        if len(ends) == 2 and values["expert_placement"] == "series":
            raise ValueError(
                f"target_blocks names {target!r}, whose input would not be read: with "
                f"expert_placement='series' experts read an output. Name {ends[1]!r} alone, in "
                "target_modules if it is a linear."
            )


def check_block_sizes(sizes: Any) -> None:
    """Raise TypeError for sizes of blocks that `save_pretrained` could not have written.

    Args:
        sizes: the value of the field block_sizes.
    """
    if sizes is None:
        return
    pairs = sizes.values() if isinstance(sizes, dict) else [None]
    is_right = all(
        isinstance(pair, list)
        and len(pair) == 2
        and all(type(width) is int and width > 0 for width in pair)
        for pair in pairs
    )
    check_type("block_sizes", sizes, is_right, "two widths a block; leave it to save_pretrained")


def checked_blocks(blocks: Any) -> list[str] | None:
    """target_blocks; sets and tuples become lists, which JSON can hold.

    Args:
        blocks: what was given.
    """
    return None if blocks is None else string_list("target_blocks", blocks)


def not_lora(config: Any) -> list[str]:
    """Why the experts of a configuration are not LoRAs, s·BA added to linears; empty if they are.

    Args:
        config: a `MoeLoraConfig`.
    """
    reasons = []
    if config.expert_activation is not None:
        reasons.append(f"expert_activation={config.expert_activation!r} acts between A and B")
    if config.expert_placement != "parallel":
        reasons.append(f"expert_placement={config.expert_placement!r} reads what modules give")
    if config.target_blocks:
        reasons.append(f"target_blocks={config.target_blocks} are more than one linear each")
    return reasons


def check_lora(config: Any, what: str) -> None:
    """Raise ValueError where the experts of a configuration are not LoRAs.

    Args:
        config: a `MoeLoraConfig`.
        what: what needs them to be, the beginning of a sentence.
    """
    if reasons := not_lora(config):
        raise ValueError(
            f"{what} is for LoRA experts, which add s·BA to the weight of a linear, and here "
            f"{' and '.join(reasons)}: keep the mixture as a whole (save_pretrained), or make one "
            "with expert_activation=None, expert_placement='parallel' and no target_blocks."
        )
