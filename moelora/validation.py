"""Checks of single values that several rooms share: what came, what was expected."""

from __future__ import annotations

import math
import reprlib
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

# More than anybody means: from a damaged file or a typing error, it would fill memory and time.
MAX_EXPERTS = 2**16
MAX_RANK = 2**16
MAX_TOTAL_RANK = 2**20
MAX_WIDTH = 2**16
MAX_ITEMS = 2**18
MAX_DEPTH = 32
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
    """`value` for an error message: short, and safe for any depth and size.

    Args:
        value: anything.
    """
    try:
        return _REPR.repr(value)
    except (ValueError, RecursionError):
        # An integer of thousands of digits, or an object whose repr recurses.
        return f"a {type(value).__name__} too large to print"


def check_depth(name: str, value: Any) -> None:
    """Raise ValueError if lists and dicts are nested too deep or hold too much to go through.

    Args:
        name: the argument, for errors.
        value: what came, of any type.
    """
    level = [value]
    for _ in range(MAX_DEPTH):
        inner: list[Any] = []
        for outer in level:
            if isinstance(outer, dict):
                inner.extend(outer.values())
            elif isinstance(outer, (list, tuple, set)):
                inner.extend(outer)
            if len(inner) > MAX_ITEMS:
                raise ValueError(f"{name} holds too much; expected at most {MAX_ITEMS} values.")
        if not inner:
            return
        level = inner
    raise ValueError(f"{name} is nested deeper than {MAX_DEPTH} levels.")


def check_integer(name: str, value: Any, low: int, high: int = sys.maxsize) -> None:
    """Raise TypeError or ValueError unless `value` is an integer in the range.

    Args:
        name: the argument, for errors.
        value: what came.
        low: the smallest valid one.
        high: the largest valid one.
    """
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(
            f"{name}={shown(value)} is a {type(value).__name__}; "
            f"expected an integer of at least {low}."
        )
    if value < low:
        raise ValueError(
            f"{name}={shown(value)} is too small; expected an integer of at least {low}."
        )
    if value > high:
        raise ValueError(
            f"{name}={shown(value)} is too large; expected an integer from {low} to {high}."
        )


def check_number(
    name: str, value: Any, low: float, high: float, open_low: bool = False, open_high: bool = False
) -> None:
    """Raise TypeError or ValueError unless `value` is a finite number in the range.

    Args:
        name: the argument, for errors.
        value: what came.
        low: the lower end of the range.
        high: its upper end.
        open_low: the lower end itself is not valid.
        open_high: the upper end itself is not valid.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}={shown(value)} is a {type(value).__name__}; expected a number.")
    inside = (value > low if open_low else value >= low) and (
        value < high if open_high else value <= high
    )
    # Not math.isfinite, which fails on an integer that is too large for a float.
    if not (inside and abs(value) <= sys.float_info.max):
        closing = ")" if open_high or high == math.inf else "]"
        bounds = f"{'(' if open_low else '['}{low}, {high}{closing}"
        raise ValueError(
            f"{name}={shown(value)} is out of range; expected a finite number in {bounds}."
        )


def check_flag(name: str, value: Any) -> None:
    """Raise TypeError unless `value` is True or False.

    Args:
        name: the argument, for errors.
        value: what came.
    """
    if not isinstance(value, bool):
        raise TypeError(
            f"{name}={shown(value)} is a {type(value).__name__}; expected True or False."
        )


def check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    """Raise ValueError unless `value` is one of `choices`.

    Args:
        name: the argument, for errors.
        value: what came.
        choices: the valid ones.
    """
    if not isinstance(value, str) or value not in choices:
        raise ValueError(
            f"{name}={shown(value)} is unknown; expected one of: {', '.join(choices)}."
        )


def string_list(name: str, value: Any, may_be_empty: bool = False) -> list[str]:
    """`value` as a list of strings; a lone string is refused, since iterating it gives letters.

    Args:
        name: the argument, for errors.
        value: what came.
        may_be_empty: an empty list is valid.

    Raises:
        TypeError, ValueError: it is not a list, tuple or set of non-empty strings.
    """
    if not isinstance(value, (list, tuple, set)) or not all(
        isinstance(v, str) and v for v in value
    ):
        raise TypeError(f"{name}={shown(value)}: expected a list of non-empty strings.")
    if not value and not may_be_empty:
        raise ValueError(f"{name} is empty: name at least one, or leave it out for the default.")
    return sorted(value) if isinstance(value, set) else list(value)


def numbers(name: str, value: Any) -> int | list[int]:
    """One whole number from 0, or several, which come back as a sorted list.

    Args:
        name: the argument, for errors.
        value: what came.

    Raises:
        TypeError, ValueError: it is neither, or an empty list.
    """
    several = isinstance(value, (list, tuple, set))
    if several and not value:
        raise ValueError(f"{name} is empty: give numbers, or None for all.")
    for number in value if several else [value]:
        check_integer(name, number, 0)
    return sorted(value) if several else value


def check_name_lists(name: str, value: Any) -> None:
    """Raise TypeError or ValueError unless `value` is a list of lists of names.

    Args:
        name: the argument, for errors.
        value: what came.
    """
    if not (isinstance(value, list) and value and all(isinstance(own, list) for own in value)):
        raise TypeError(
            f"{name}={shown(value)}: expected lists of module names; leave it to save_pretrained."
        )
    for own in value:
        string_list(name, own)


def check_names(given: Iterable[Any], known: Sequence[str], called: str = "choices") -> None:
    """Raise ValueError where one of `given` is not among the experts `known`, and list these.

    Args:
        given: what came.
        known: the names that there are.
        called: what the names are of, for errors.
    """
    unknown = sorted(str(name) for name in given if name not in known)
    if unknown:
        raise ValueError(
            f"There is no expert {', '.join(map(repr, unknown))}. The {called} are: "
            f"{', '.join(known)}."
        )


def check_by_linear(
    name: str, table: Any, num_experts: int, check: Callable[..., None], *bounds: float
) -> None:
    """Raise TypeError or ValueError unless `table` has for each linear one good number an expert.

    Args:
        name: the argument, for errors.
        table: lists of numbers by the linear's name, or None.
        num_experts: how long each list is.
        check: `check_integer` or `check_number`.
        bounds: what `check` takes after the value.
    """
    if table is not None and not (
        isinstance(table, dict) and all(isinstance(k, str) for k in table)
    ):
        raise TypeError(f"{name}={shown(table)}: expected a dict of lists by the linear's name.")
    for linear, values in (table or {}).items():
        own = f"{name}[{shown(linear)}]"
        if not isinstance(values, list) or len(values) != num_experts:
            raise ValueError(
                f"{own}={shown(values)}: expected a list with one number for each of the "
                f"{num_experts} experts."
            )
        for value in values:
            check(own, value, *bounds)


def expert_name_problem(name: Any) -> str | None:
    """Why an expert cannot have this name, which also names the folder that it is exported to.

    Args:
        name: the name, of any type.

    Returns:
        What is wrong with it, in words; None if it is valid.
    """
    if not isinstance(name, str):
        return f"the name {shown(name)} is a {type(name).__name__}; expected a string"
    reason = None
    if not name.strip() or len(name) > MAX_NAME:
        reason = f"has {len(name)} letters; expected 1 to {MAX_NAME}"
    elif name != name.strip() or name[0] == "." or name[-1] == ".":
        reason = "begins or ends with a dot or a space"
    elif any(c in '/\\:*?"<>|' or not c.isprintable() for c in name):
        reason = "holds a separator or a character that no folder may have"
    elif name.partition(".")[0].lower() in RESERVED:
        reason = "is reserved by an operating system"
    return (
        None if reason is None else f"the name {shown(name)} {reason}: it must be fit for a folder"
    )


def check_expert_names(name: str, names: Sequence[str]) -> None:
    """Raise ValueError unless each name is valid, and no two are alike but for case.

    Args:
        name: the argument, for errors.
        names: the experts' names.
    """
    seen: dict[str, str] = {}
    for own in names:
        if problem := expert_name_problem(own):
            raise ValueError(f"{name}: {problem}.")
        other = seen.setdefault(own.casefold(), own)
        if other is not own:
            raise ValueError(
                f"{name} contains {other!r} and {own!r}, which differ in case alone: some file "
                "systems would hold both in one folder. Rename one."
            )
