"""All that depends on where a tree keeps its factors, routers and counts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

E = 4


def counts(model: Any) -> dict[str, Tensor]:
    """The expert counts of the step under way and of the one before, and the selection bias."""
    load = model.moelora.load
    return {name: getattr(load, name).clone() for name in ("current", "previous", "bias")}


def lora_Bs(site: Any) -> list[Any]:
    """The B factor of each linear of a site."""
    if hasattr(site, "linears"):
        return [linear.lora_B for linear in site.linears]
    return list(site.lora_B)


def trained_rows(factor: Any) -> nn.Parameter | None:
    """The trainable parameter of a stacked factor."""
    return factor.rows if hasattr(factor, "rows") else factor.weight


def routers(model: Any) -> dict[str, nn.Module]:
    """The routers by what they route, with the names as modules have them."""
    return {name.replace("-", "."): router for name, router in model.moelora.routers.items()}


def trainable(model: Any, frozen: frozenset[int] = frozenset()) -> dict[str, Tensor]:
    """Views of all that trains: by (linear, factor, expert), (router, parameter), and name."""
    parts, owned = {}, set()
    config = model.moelora_config
    for site in model.moelora.sites.values():
        a = trained_rows(site.lora_A)
        blocks = [(f"{n}|A{e}", config.ranks_of(n)[e]) for n in site.names for e in range(E)]
        held = [("A", a, blocks)]
        for name, factor in zip(site.names, lora_Bs(site), strict=True):
            blocks = [(f"{name}|B{e}", config.ranks_of(name)[e]) for e in range(E)]
            held.append(("B", trained_rows(factor), blocks))
        for _, rows, blocks in held:
            if rows is None:
                continue
            owned.add(id(rows))
            blocks = [(key, size) for key, size in blocks if int(key[-1]) not in frozen]
            parts |= dict(zip([k for k, _ in blocks], _split(rows, [n for _, n in blocks])))
    for name, router in routers(model).items():
        for key, parameter in router.named_parameters():
            owned.add(id(parameter))
            parts[f"router {name}|{key}"] = (parameter, slice(None))
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and id(parameter) not in owned:
            parts[f"base {name}"] = (parameter, slice(None))
    return parts


def _split(rows: nn.Parameter, sizes: list[int]) -> Iterator[tuple[nn.Parameter, slice]]:
    assert sum(sizes) == len(rows), (sizes, rows.shape)
    start = 0
    for size in sizes:
        yield rows, slice(start, start + size)
        start += size
