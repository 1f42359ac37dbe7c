"""LoraHub (arXiv:2307.13269): the weights of a fixed mixture that have the lowest loss."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..core.model import MixtureModel, evaluating
from ..training.evaluation import predictions, summed_loss
from ..validation import check_integer, check_number

Loss = Callable[[], float]
History = list[tuple[dict[str, float], float]]


class _Spent(Exception):
    """The budget is used up: it ends an optimizer of scipy from inside the loss."""


def search_weights(
    model: MixtureModel,
    names: Sequence[str],
    loss: Loss | Iterable[Mapping[str, Tensor]],
    *,
    budget: int = 100,
    seed: int = 0,
    bounds: tuple[float, float] = (-1.5, 1.5),
) -> tuple[dict[str, float], History]:
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
    names = _checked_names(model, names)
    low, high = _checked_bounds(bounds)
    check_integer("budget", budget, 1)
    check_integer("seed", seed, 0)
    measure = loss if callable(loss) else _mean_loss(model, loss)
    history: History = []
    known: dict[tuple[float, ...], float] = {}

    def evaluate(point: Any) -> float:
        # A rounding may carry a step out of the box.
        values = tuple(min(max(float(w), low), high) for w in point)
        if values not in known:
            if len(history) >= budget:
                raise _Spent
            weights = dict(zip(names, values))
            with model.use_experts(weights):
                value = float(measure())
            history.append((weights, value))
            # A loss that overflows says only that it is bad there.
            known[values] = value if math.isfinite(value) else math.inf
        return known[values]

    _minimise(_scipy(), evaluate, history, len(names), budget, seed, (low, high))
    finite = [(weights, value) for weights, value in history if math.isfinite(value)]
    if not finite:
        raise ValueError(f"The loss was NaN or Inf at all {len(history)} weights that were tried.")
    return min(finite, key=lambda tried: tried[1])[0], history


def _minimise(
    scipy_optimize: Any,
    evaluate: Callable[[Any], float],
    history: History,
    count: int,
    budget: int,
    seed: int,
    bounds: tuple[float, float],
) -> None:
    """Spend the budget; the best is in `history`."""
    box = [bounds] * count
    start = [min(max(1 / count, bounds[0]), bounds[1])] * count
    explored = max(1, budget * 2 // 3)

    def within(point: Any) -> float:
        if len(history) >= explored:
            raise _Spent
        return evaluate(point)

    try:
        within(start)
        # scipy's populations have at least five; about six generations for what is given.
        size = max(1, round(explored / (6 * count)))
        scipy_optimize.differential_evolution(
            within, box, x0=start, popsize=size, maxiter=budget, tol=0, polish=False, rng=seed
        )
    except _Spent:
        pass
    best = min(history, key=lambda tried: tried[1] if math.isfinite(tried[1]) else math.inf)[0]
    try:
        options = {"maxfev": budget, "xatol": 1e-6, "fatol": 1e-9}
        scipy_optimize.minimize(
            evaluate, list(best.values()), method="Nelder-Mead", bounds=box, options=options
        )
    except _Spent:
        pass


def _mean_loss(model: MixtureModel, batches: Iterable[Mapping[str, Tensor]]) -> Loss:
    """A function that gives the model's mean loss over all labels of some batches."""
    if not isinstance(batches, Iterable) or iter(batches) is batches:
        raise TypeError(
            f"loss is a {type(batches).__name__}; expected a function without arguments, or "
            "batches that can be read again, such as a list."
        )

    @torch.no_grad()
    def measure() -> float:
        total = 0.0
        count = 0
        with evaluating(model):
            for batch in batches:
                logits, labels = predictions(model, batch)
                total += summed_loss(logits, labels)
                count += len(labels)
        if not count:
            raise ValueError(
                "There is no label other than -100 in the batches: nothing to search for."
            )
        return total / count

    return measure


def _scipy() -> Any:
    try:
        from scipy import optimize
    except ImportError as error:
        raise ImportError(
            "search_weights needs scipy, which is not installed: pip install 'moelora[search]'."
        ) from error
    return optimize


def _checked_names(model: MixtureModel, names: Sequence[str]) -> list[str]:
    if isinstance(names, str) or not names:
        raise ValueError(f"names={names!r}: expected a list with at least one expert's name.")
    for name in names:
        model.moelora_config.expert_index(name)
    if len(set(names)) != len(names):
        raise ValueError(f"names={list(names)} names an expert twice.")
    return list(names)


def _checked_bounds(bounds: tuple[float, float]) -> tuple[float, float]:
    if not isinstance(bounds, (tuple, list)) or len(bounds) != 2:
        raise TypeError(f"bounds={bounds!r}: expected a pair (low, high).")
    low, high = bounds
    check_number("bounds[0]", low, -math.inf, math.inf)
    check_number("bounds[1]", high, -math.inf, math.inf)
    if low >= high:
        raise ValueError(f"bounds={bounds}: expected a low end below the high end.")
    return float(low), float(high)
