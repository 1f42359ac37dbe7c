"""Checks of single values that several rooms share: what came, what was expected."""

from __future__ import annotations

import json
import math
import reprlib
import sys
from collections.abc import Callable, Iterable, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any

# More than anybody means: from a damaged file or a typing error, it would fill memory and time.
MAX_EXPERTS = 2**16
MAX_RANK = 2**16
MAX_TOTAL_RANK = 2**20
MAX_WIDTH = 2**16
MAX_ITEMS = 2**18
MAX_DEPTH = 32
# Largest seen in practice: the shapes of a base of ten thousand tensors, a megabyte.
MAX_JSON_LENGTH = 2**24
# Fit for a folder, with room for what is put before and after.
MAX_NAME = 96
# What Windows keeps for devices, whatever the suffix.
RESERVED = {
    *("con", "prn", "aux", "nul"),
    *(f"{port}{i}" for port in ("com", "lpt") for i in range(1, 10)),
}

_REPR = reprlib.Repr()
_REPR.maxlist = 8
_REPR.maxstring = 120
_REPR.maxother = 120


def shown(value: Any) -> str:
    """`value` for an error message: short, and safe for any depth and size."""
    try:
        return _REPR.repr(value)
    except (ValueError, RecursionError):
        # An integer of thousands of digits, or an object whose repr recurses.
        return f"a {type(value).__name__} too large to print"


def check_depth(name: str, value: Any) -> None:
    """Raise ValueError if lists and dicts are nested too deep or hold too much to go through."""
    level = [value]
    for _ in range(MAX_DEPTH):
        lists = (own for own in level if isinstance(own, (list, tuple, set)))
        dicts = (own.values() for own in level if isinstance(own, dict))
        level = list(islice(chain.from_iterable(chain(lists, dicts)), MAX_ITEMS + 1))
        if len(level) > MAX_ITEMS:
            raise ValueError(f"{name} holds too much; expected at most {MAX_ITEMS} values.")
        if not level:
            return
    raise ValueError(f"{name} is nested deeper than {MAX_DEPTH} levels.")


def json_object(source: str | Path, limit: int = MAX_JSON_LENGTH) -> dict[str, Any]:
    """The object that a JSON text, or the file at a path, holds; an error of some kind for anything
    else.
    """
    is_file = isinstance(source, Path)
    if (source.stat().st_size if is_file else len(source)) > limit:
        raise ValueError(f"it is too long; expected at most {limit} bytes")
    value = json.loads(source.read_text(encoding="utf-8") if is_file else source)
    if not isinstance(value, dict):
        raise ValueError(f"it holds a JSON {type(value).__name__}; expected an object")
    return value


def check_type(name: str, value: Any, is_right: bool, expected: str) -> None:
    """Raise TypeError with what was expected, unless `is_right`."""
    if not is_right:
        raise TypeError(f"{name}={shown(value)} is a {type(value).__name__}; expected {expected}.")


def check_flag(name: str, value: Any) -> None:
    """Raise TypeError unless `value` is True or False."""
    check_type(name, value, isinstance(value, bool), "True or False")


def check_integer(name: str, value: Any, low: int, high: int = sys.maxsize) -> None:
    """Raise TypeError or ValueError unless `value` is an integer from `low` to `high`."""
    is_integer = isinstance(value, int) and not isinstance(value, bool)
    check_type(name, value, is_integer, f"an integer of at least {low}")
    if not low <= value <= high:
        size = "small" if value < low else "large"
        most = "" if high == sys.maxsize else f" and at most {high}"
        raise ValueError(
            f"{name}={shown(value)} is too {size}; expected an integer of at least {low}{most}."
        )


def check_number(
    name: str, value: Any, low: float, high: float, open_low: bool = False, open_high: bool = False
) -> None:
    """Raise TypeError or ValueError unless `value` is a finite number from `low` to `high`.

    open_low, open_high: this end of the range is not valid itself.
    """
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    check_type(name, value, is_number, "a number")
    above = value > low if open_low else value >= low
    below = value < high if open_high else value <= high
    # Not math.isfinite, which fails on an integer that is too large for a float.
    if not (above and below and abs(value) <= sys.float_info.max):
        opening = "(" if open_low else "["
        closing = ")" if open_high or high == math.inf else "]"
        raise ValueError(
            f"{name}={shown(value)} is out of range; expected a finite number in "
            f"{opening}{low}, {high}{closing}."
        )


def check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    """Raise ValueError unless `value` is one of `choices`."""
    if not isinstance(value, str) or value not in choices:
        raise ValueError(
            f"{name}={shown(value)} is unknown; expected one of: {', '.join(choices)}."
        )


def string_list(name: str, value: Any, may_be_empty: bool = False) -> list[str]:
    """`value` as a list of strings; a lone string is refused, since iterating it gives letters."""
    is_list = isinstance(value, (list, tuple, set))
    has_strings = is_list and all(isinstance(v, str) and v for v in value)
    check_type(name, value, has_strings, "a list of non-empty strings")
    if not value and not may_be_empty:
        raise ValueError(f"{name} is empty: name at least one, or leave it out for the default.")
    return sorted(value) if isinstance(value, set) else list(value)


def check_names(given: Iterable[Any], known: Sequence[str], called: str = "choices") -> None:
    """Raise ValueError where one of `given` is not among the experts `known`, and list these."""
    if unknown := sorted(repr(name) for name in given if name not in known):
        raise ValueError(
            f"There is no expert {', '.join(unknown)}. The {called} are: {', '.join(known)}."
        )


def check_by_linear(
    name: str, table: Any, num_experts: int, check: Callable[..., None], *bounds: float
) -> None:
    """Raise TypeError or ValueError unless `table` is None or has for each linear a list with one
    number an expert, which `check` finds within the bounds.
    """
    if table is None:
        return
    by_name = isinstance(table, dict) and all(isinstance(key, str) for key in table)
    check_type(name, table, by_name, "a dict of lists by the linear's name")
    for linear, values in table.items():
        own = f"{name}[{shown(linear)}]"
        if not isinstance(values, list) or len(values) != num_experts:
            raise ValueError(
                f"{own}={shown(values)}: expected a list with one number for each of the "
                f"{num_experts} experts."
            )
        for value in values:
            check(own, value, *bounds)


def expert_name_problem(name: Any) -> str | None:
    """Why an expert, and the folder it is exported to, cannot have this name; None if it can."""
    if not isinstance(name, str):
        return f"the name {shown(name)} is a {type(name).__name__}; expected a string"
    if not name.strip() or len(name) > MAX_NAME:
        reason = f"has {len(name)} letters; expected 1 to {MAX_NAME}"
    elif name != name.strip() or name[0] == "." or name[-1] == ".":
        reason = "begins or ends with a dot or a space"
    elif any(c in '/\\:*?"<>|' or not c.isprintable() for c in name):
        reason = "holds a separator or a character that no folder may have"
    elif name.partition(".")[0].lower() in RESERVED:
        reason = "is reserved by an operating system"
    else:
        return None
    return f"the name {shown(name)} {reason}: it must be fit for a folder"
