"""A router's own settings: `MoeLoraConfig.router_options`, read into the dataclass that its class
declares.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import MISSING, asdict, fields, is_dataclass
from typing import Any, get_type_hints

from huggingface_hub.dataclasses import type_validator

from ..registry import router_class
from ..validation import check_depth, check_type, shown


def read_options(declared: type, given: Any, owner: str) -> Any:
    """The options that the dataclass `declared` of the class `owner` makes of `given`, checked."""
    given = {} if given is None else given
    check_type("router_options", given, isinstance(given, Mapping), "a dict")
    check_depth("router_options", given)
    hints = {option.name: get_type_hints(declared)[option.name] for option in fields(declared)}
    if unknown := [name for name in given if name not in hints]:
        known = ", ".join(hints) or "none"
        raise ValueError(
            f"router_options: {owner} has no option {shown(unknown)}. Its options are: {known}."
        )
    options = declared(**{name: _typed(name, value, hints[name]) for name, value in given.items()})
    values = asdict(options)
    with suppress(TypeError, ValueError):
        if json.loads(json.dumps(values, allow_nan=False)) == values:
            return options
    raise ValueError(
        f"router_options={shown(values)} cannot be saved as JSON: give {owner} finite numbers, "
        "strings, booleans, None, and lists and dicts (by strings) of those."
    )


def changed_options(
    router: str, saved: Mapping[str, Any] | None, given: Mapping[str, Any] | None
) -> dict[str, Any]:
    """The saved options with those of `given` put in, where trained routers allow that.

    Args:
        router: the router's name.
        saved: the options that the checkpoint's routers were trained with.
        given: the options that the caller wants, all or some of them.

    Raises:
        ValueError, TypeError: an option that cannot change, because trained tensors mean what it
            says (a router lists the others in `changeable_options`), or a value that is not valid.
    """
    cls = router_class(router)
    before = asdict(cls.read_options(saved))
    # Read by itself first, which checks what it is.
    cls.read_options(given)
    after = asdict(cls.read_options({**before, **(given or {})}))
    changed = {name for name in after if after[name] != before[name]}
    if fixed := sorted(changed - cls.changeable_options):
        raise ValueError(
            f"router_options: {', '.join(fixed)} cannot be changed when loading, since the routers "
            f"were trained with {', '.join(f'{name}={before[name]!r}' for name in fixed)}. "
            f"These can: {', '.join(sorted(cls.changeable_options)) or 'none'}."
        )
    return after


def check_declared_options(cls: Any) -> None:
    """Raise unless every option of a router's class has a default that is valid itself."""
    if not (isinstance(cls.Options, type) and is_dataclass(cls.Options)):
        raise TypeError(f"{cls.__name__}.Options is not a dataclass: write @dataclass above it.")
    for option in fields(cls.Options):
        if option.default is MISSING and option.default_factory is MISSING:
            raise TypeError(f"{cls.__name__}.Options.{option.name} has no default: give it one.")
    defaults = asdict(cls.read_options(None))
    cls.read_options(defaults)
    if unknown := sorted(cls.changeable_options - defaults.keys()):
        names = ", ".join(unknown)
        raise ValueError(f"{cls.__name__}.changeable_options names {names}, not its Options.")


def _typed(name: str, value: Any, hint: Any) -> Any:
    """`value`, if it is of the type `hint`; a whole number counts as a float where one is meant."""
    candidates = [value]
    if type(value) is int and abs(value) < 2**53:
        candidates.append(float(value))
    # Older validators take True for a 1.
    if type(value) is bool and hint in (int, float):
        candidates = []
    for candidate in candidates:
        with suppress(TypeError, ValueError):
            type_validator(name, candidate, hint)
            return candidate
    expected = hint.__name__ if isinstance(hint, type) else hint
    check_type(f"router_options[{name!r}]", value, False, str(expected))
