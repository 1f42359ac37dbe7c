"""The names of the routers, below the configuration, which looks them up."""

from __future__ import annotations

from typing import Any

from .validation import shown

# The classes of routers by name; `moelora.routers` and users' files put them in.
ROUTERS: dict[str, Any] = {}


def router_class(name: object) -> Any:
    """The class of `MoeLoraConfig(router=name)`.

    Args:
        name: a name in `ROUTERS`.

    Raises:
        ValueError: there is no such router, with the ones that there are.
    """
    if not isinstance(name, str) or name not in ROUTERS:
        raise ValueError(
            f"router={shown(name)} is not registered. "
            f"The routers are: {', '.join(sorted(ROUTERS))}. A new "
            "one is a class with @register_router(name)."
        )
    return ROUTERS[name]
