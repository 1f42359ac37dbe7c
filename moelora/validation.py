"""Checks of single values: what came, what was expected."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence


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


def check_names(given: Iterable, known: Sequence[str], called: str = "choices") -> None:
    """Raise ValueError where one of `given` is not among the experts `known`, and list these."""
    unknown = sorted(str(name) for name in given if name not in known)
    if unknown:
        raise ValueError(
            f"There is no expert {', '.join(map(repr, unknown))}. The {called} are: "
            f"{', '.join(known)}."
        )


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
