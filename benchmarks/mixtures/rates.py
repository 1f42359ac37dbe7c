"""The learning rate of a model: doubled and halved until worse ones lie on either side of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

# Where every search begins, and where it ends at the latest.
RATES = (1e-3, 2e-3)
LEAST = 2.5e-4
MOST = 1.6e-2


def search(loss: Callable[[float], float], given: Sequence[float] | None = None) -> float:
    """The rate of the lowest loss.

    given: the rates to choose among, instead of a search; of a single one nothing is asked.
    """
    if given and len(given) == 1:
        return given[0]
    tried = {rate: loss(rate) for rate in given or RATES}
    while not given:
        beyond = _beyond(tried)
        if beyond is None or not LEAST <= beyond <= MOST:
            break
        tried[beyond] = loss(beyond)
    return min(tried, key=lambda rate: tried[rate])


def _beyond(tried: dict[float, float]) -> float | None:
    """The next rate to try; None where the best one lies between others."""
    best = min(tried, key=lambda rate: tried[rate])
    if best == min(tried):
        return best / 2
    return best * 2 if best == max(tried) else None
