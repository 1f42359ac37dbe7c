"""Checks of single values: what came, what was expected."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

# What Windows keeps for devices: an expert's folder could not have this name there.
RESERVED_NAMES = {
    "con",
    "prn",
    "aux",
    "nul",
    *(f"{port}{i}" for port in ("com", "lpt") for i in range(1, 10)),
}
MAX_NAME_LENGTH = 96


def check_integer(name: str, value, low: int) -> None:
    """Raise TypeError or ValueError unless `value` is an integer of at least `low`."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(
            f"{name}={value!r} is a {type(value).__name__}; expected an integer of at least {low}."
        )
    if value < low:
        raise ValueError(f"{name}={value} is too small; expected an integer of at least {low}.")


def check_number(
    name: str, value, low: float, high: float, open_low=False, open_high=False
) -> None:
    """Raise TypeError or ValueError unless `value` is a finite number in the range."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}={value!r} is a {type(value).__name__}; expected a number.")
    inside = (value > low if open_low else value >= low) and (
        value < high if open_high else value <= high
    )
    if not (inside and math.isfinite(value)):
        brackets = f"{'(' if open_low else '['}{low}, {high}{')' if open_high or high == math.inf else ']'}"
        raise ValueError(f"{name}={value} is out of range; expected a finite number in {brackets}.")


def check_flag(name: str, value) -> None:
    """Raise TypeError or ValueError unless `value` is True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name}={value!r} is a {type(value).__name__}; expected True or False.")


def check_regex(name: str, value: str) -> None:
    """Raise TypeError or ValueError unless `value` is a regular expression."""
    if not value:
        raise ValueError(
            f"{name} is empty: give module names, a regex, 'all-linear', or None for the default."
        )
    try:
        re.compile(value)
    except re.error as error:
        raise ValueError(
            f"{name}={value!r} is no valid regular expression ({error}); for one module name, write a list."
        ) from error


def string_list(name: str, value, may_be_empty: bool = False) -> list[str]:
    """`value` as a list of strings; a lone string is refused, since iterating it gives letters."""
    if not isinstance(value, (list, tuple, set)) or not all(
        isinstance(v, str) and v for v in value
    ):
        raise TypeError(f"{name}={value!r}: expected a list of non-empty strings.")
    if not value and not may_be_empty:
        raise ValueError(f"{name} is empty: name at least one, or leave it out for the default.")
    return sorted(value) if isinstance(value, set) else list(value)


def check_choice(name: str, value, choices: tuple[str, ...]) -> None:
    """Raise TypeError or ValueError unless `value` is one of `choices`."""
    if value not in choices:
        raise ValueError(f"{name}={value!r} is unknown; expected one of: {', '.join(choices)}.")


def check_by_linear(
    name: str, table: dict | None, num_experts: int, check: Callable, *bounds: float
) -> None:
    """Raise TypeError or ValueError unless `table` has for each linear a list with one good number
    an expert.
    """
    for linear, values in (table or {}).items():
        if not isinstance(values, list) or len(values) != num_experts:
            raise ValueError(
                f"{name}[{linear!r}]={values!r}: expected a list with one number for each of the "
                f"{num_experts} experts."
            )
        for value in values:
            check(f"{name}[{linear!r}]", value, *bounds)


def expert_name_problem(name: Any) -> str | None:
    """Why an expert cannot have this name, which also names the folder that it is exported to.

    Args:
        name: what is to become the expert's name.

    Returns:
        The reason, to be put into a sentence, or None where nothing speaks against the name.
    """
    if not isinstance(name, str):
        return f"the name {name!r} is a {type(name).__name__}; expected a string"
    reason = None
    if not name.strip() or len(name) > MAX_NAME_LENGTH:
        reason = f"has {len(name)} letters; expected 1 to {MAX_NAME_LENGTH}"
    elif name != name.strip() or name[0] == "." or name[-1] == ".":
        reason = "begins or ends with a dot or a space"
    elif any(c in '/\\:*?"<>|' or not c.isprintable() for c in name):
        reason = "holds a separator or a character that no folder may have"
    elif name.partition(".")[0].lower() in RESERVED_NAMES:
        reason = "is reserved by an operating system"
    return None if reason is None else f"the name {name!r} {reason}: it must be fit for a folder"
