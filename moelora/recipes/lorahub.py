"""LoraHub (arXiv:2307.13269): the weights of a fixed mixture that have the lowest loss."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any

from torch import Tensor

from ..core.model import MixtureModel
from ..training.evaluation import scored
from ..validation import check_integer, check_number, check_type

# A weight for each expert.
Point = tuple[float, ...]


class _Spent(Exception):
    """The budget is used up: it ends an optimizer of scipy from inside the loss."""


def search_weights(
    model: MixtureModel,
    names: Sequence[str],
    loss: Callable[[], float] | Iterable[Mapping[str, Tensor]],
    *,
    budget: int = 100,
    seed: int = 0,
    bounds: tuple[float, float] = (-1.5, 1.5),
) -> tuple[dict[str, float], list[tuple[dict[str, float], float]]]:
    """Search the weights of some experts that have the lowest loss.

    The loss is taken under `model.use_experts(weights)`, so nothing is merged. First come equal
    weights, then differential evolution with two thirds of the budget, then Nelder-Mead from the
    best, both of scipy.

    Args:
        model: the mixture.
        names: the experts to weigh.
        loss: a function without arguments, called in the mode that the model is in; or a list of
            batches (input_ids, labels …), whose mean loss over all labels is taken in eval mode.
        budget: how often the loss is evaluated, at most.
        seed: of differential evolution.
        bounds: of every weight.

    Returns:
        The best weights, and all that were tried with their losses, in order.

    Raises:
        ImportError: scipy is not installed.
        ValueError: no names, unknown ones or one twice, bounds that are not a range, batches
            without labels, or no finite loss anywhere.
        TypeError: batches that can be read only once, or arguments of another type.
    """
    _check(model, names, bounds)
    check_integer("budget", budget, 1)
    check_integer("seed", seed, 0)
    if not callable(loss):
        can_be_read_again = isinstance(loss, Iterable) and iter(loss) is not loss
        check_type("loss", loss, can_be_read_again, "a function, or a list to be read again")

    def measure(point: Point) -> float:
        with model.use_experts(dict(zip(names, point))):
            return float(loss() if callable(loss) else scored(model, loss)[0])

    tried = _minimise(measure, [bounds] * len(names), budget, seed)
    history = [(dict(zip(names, point)), value) for point, value in tried.items()]
    best, lowest = min(history, key=lambda one: _or_infinite(one[1]))
    if not math.isfinite(lowest):
        raise ValueError(f"The loss was NaN or Inf at all {len(history)} weights that were tried.")
    return best, history


def _or_infinite(loss: float) -> float:
    """A loss that overflows says only that it is bad there."""
    return loss if math.isfinite(loss) else math.inf


def _minimise(
    measure: Callable[[Point], float], box: list[tuple[float, float]], budget: int, seed: int
) -> dict[Point, float]:
    """The points in the box that were tried and their losses, in order; first equal weights."""
    try:
        from scipy import optimize
    except ImportError as error:
        raise ImportError("search_weights needs scipy: pip install 'moelora[search]'.") from error
    low, high = box[0]
    tried: dict[Point, float] = {}

    def evaluate(given: Any, limit: int = budget) -> float:
        # A rounding may carry a step out of the box.
        point = tuple(min(max(float(weight), low), high) for weight in given)
        if point not in tried:
            if len(tried) >= limit:
                raise _Spent
            tried[point] = measure(point)
        return _or_infinite(tried[point])

    explored = max(1, budget * 2 // 3)
    # scipy's populations have at least five; about six generations for what is given.
    size = max(1, round(explored / (6 * len(box))))
    settings: dict[str, Any] = {"popsize": size, "maxiter": budget, "tol": 0, "polish": False}
    with suppress(_Spent):
        evaluate([1 / len(box)] * len(box))
        (start,) = tried
        optimize.differential_evolution(evaluate, box, (explored,), x0=start, rng=seed, **settings)
    options = {"maxfev": budget, "xatol": 1e-6, "fatol": 1e-9}
    with suppress(_Spent):
        best = min(tried, key=evaluate)
        optimize.minimize(evaluate, best, method="Nelder-Mead", bounds=box, options=options)
    return tried


def _check(model: MixtureModel, names: Any, bounds: Any) -> None:
    if isinstance(names, str) or not names:
        raise ValueError(f"names={names!r}: expected a list with at least one expert's name.")
    for name in names:
        model.moelora_config.expert_index(name)
    if len(set(names)) != len(names):
        raise ValueError(f"names={list(names)} names an expert twice.")
    is_pair = isinstance(bounds, (tuple, list)) and len(bounds) == 2
    check_type("bounds", bounds, is_pair, "a pair (low, high)")
    for i, bound in enumerate(bounds):
        check_number(f"bounds[{i}]", bound, -math.inf, math.inf)
    if bounds[0] >= bounds[1]:
        raise ValueError(f"bounds={bounds}: expected a low end below the high end.")
