"""A router's own settings: `MoeLoraConfig.router_options`, read into the dataclass that its class
declares.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Any, TypedDict, get_type_hints

from huggingface_hub.dataclasses import StrictDataclassFieldValidationError, validate_typed_dict

from ..validation import check_depth, shown


def read_options(declared: type, given: object, owner: str) -> Any:
    """The options that the dataclass `declared` makes of `given`.

    Args:
        declared: a dataclass with a type and a default for each option; its `__post_init__` checks
            ranges.
        given: a mapping from options to values; None for all defaults.
        owner: whose options they are, for errors.

    Raises:
        ValueError, TypeError: an option that does not exist, with the valid ones, or a value of
            another type, out of range, or that JSON cannot hold.
    """
    given = {} if given is None else given
    if not isinstance(given, Mapping):
        raise TypeError(
            f"router_options={shown(given)} is a {type(given).__name__}; expected a dict."
        )
    check_depth("router_options", given)
    names = [option.name for option in fields(declared)]
    if unknown := [name for name in given if name not in names]:
        raise ValueError(
            f"router_options: {owner} has no option {shown(unknown)}. "
            f"Its options are: {', '.join(names) or 'none'}."
        )
    hints = get_type_hints(declared)
    options = declared(**{name: _typed(name, given[name], hints[name]) for name in given})
    values = asdict(options)
    try:
        survives = json.loads(json.dumps(values, allow_nan=False)) == values
    except (TypeError, ValueError):
        survives = False
    if not survives:
        raise ValueError(
            f"router_options={shown(values)} cannot be saved as JSON: give {owner} finite numbers, "
            "strings, booleans, None, and lists and dicts (by strings) of those."
        )
    return options


def _typed(name: str, value: Any, hint: Any) -> Any:
    """`value`, if it is of the type `hint`; a whole number counts as a float where one is meant."""
    schema: Any = TypedDict("Option", {name: hint})  # type: ignore[misc]
    whole = type(value) is int and abs(value) < 2**53
    for candidate in (value, float(value)) if whole else (value,):
        try:
            validate_typed_dict(schema, {name: candidate})
        except StrictDataclassFieldValidationError:
            continue
        return candidate
    expected = getattr(hint, "__name__", str(hint)) if isinstance(hint, type) else str(hint)
    raise TypeError(
        f"router_options[{name!r}]={shown(value)} is a {type(value).__name__}; expected {expected}."
    )
