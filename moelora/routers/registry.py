"""The routers by name: `MoeLoraConfig(router=name)`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import MISSING, asdict, fields, is_dataclass
from typing import Any, TypeVar

from ..registry import ROUTERS, router_class
from .base import Router

R = TypeVar("R", bound=Router)


def register_router(name: str) -> Callable[[type[R]], type[R]]:
    """Class decorator that makes a `Router` available as `MoeLoraConfig(router=name)`.

    Args:
        name: what configurations call it.

    Raises:
        ValueError: the name is taken by another class, or a default of its options is not valid.
        TypeError: the class is not a `Router`, or its `Options` are not a dataclass with defaults.
    """

    def register(cls: type[R]) -> type[R]:
        if not (isinstance(cls, type) and issubclass(cls, Router)):
            raise TypeError(f"@register_router({name!r}) takes a subclass of Router, not {cls!r}.")
        _check_declared_options(cls)
        taken = ROUTERS.get(name)
        # A module that is imported twice (a notebook cell run again) may replace itself.
        if taken is not None and _origin(taken) != _origin(cls):
            raise ValueError(
                f"The router name {name!r} is taken by {taken.__module__}.{taken.__qualname__}."
            )
        ROUTERS[name] = cls
        return cls

    return register


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
    fixed = sorted(
        name for name in after if after[name] != before[name] and name not in cls.changeable_options
    )
    if fixed:
        raise ValueError(
            f"router_options: {', '.join(fixed)} cannot be changed when loading, since the routers "
            f"were trained with {', '.join(f'{name}={before[name]!r}' for name in fixed)}. "
            f"These can: {', '.join(sorted(cls.changeable_options)) or 'none'}."
        )
    return after


def _origin(cls: type) -> tuple[str, str]:
    return cls.__module__, cls.__qualname__


def _check_declared_options(cls: type[Router]) -> None:
    """Raise unless every option has a default that is valid itself."""
    if not (isinstance(cls.Options, type) and is_dataclass(cls.Options)):
        raise TypeError(f"{cls.__name__}.Options is not a dataclass: write @dataclass above it.")
    for option in fields(cls.Options):
        if option.default is MISSING and option.default_factory is MISSING:
            raise TypeError(f"{cls.__name__}.Options.{option.name} has no default: give it one.")
    cls.read_options(asdict(cls.read_options(None)))
    if unknown := cls.changeable_options - {option.name for option in fields(cls.Options)}:
        raise ValueError(
            f"{cls.__name__}.changeable_options names {', '.join(sorted(unknown))}, "
            "which are not among its Options."
        )
