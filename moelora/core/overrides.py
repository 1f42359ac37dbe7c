"""Deciding in the routers' place: `use_experts`, and the inputs `expert_weights` and
`banned_experts` of a forward.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..config import MoeLoraConfig
from ..routers import Routing
from ..validation import check_number


@dataclass(frozen=True)
class Forcing:
    """What the routers may not decide in a forward pass.

    expert_ids, expert_weights: `[N, K]` of one row for all tokens, one a sequence, or one a token;
    None where the routers choose. banned: `[E]` bool, the experts that may not be chosen; None
    where all may.
    complete: no slot is empty and no row names an expert twice.
    """

    expert_ids: Tensor | None = None
    expert_weights: Tensor | None = None
    banned: Tensor | None = None
    complete: bool = False

    @property
    def chooses(self) -> bool:
        """Whether the routers are not asked at all."""
        return self.expert_weights is not None

    @property
    def learns(self) -> bool:
        """Whether the given weights take a gradient."""
        return self.expert_weights is not None and self.expert_weights.requires_grad

    def routing(self, x: Tensor, batch: int) -> tuple[Routing, int]:
        """The routing of x `[…, d]` of `batch` sequences, and how many tokens each of its rows
        stands for.

        Raises:
            ValueError: x is not made of the tokens or sequences that the weights were given for.
        """
        assert self.expert_ids is not None and self.expert_weights is not None
        num_tokens, rows = x.shape[:-1].numel(), len(self.expert_weights)
        ids, weights = self.expert_ids.to(x.device), self.expert_weights.to(x.device)
        each = 1
        if rows == 1:
            ids, weights = ids.expand(num_tokens, -1), weights.expand(num_tokens, -1)
        elif rows == batch and num_tokens % batch == 0:
            each = num_tokens // batch
        elif rows != num_tokens:
            raise ValueError(
                f"expert_weights has {rows} rows of weights ({batch} sequences), but an adapted linear reads an "
                f"input of shape {tuple(x.shape)}, which is not made of these: give one row for each sequence "
                f"[{batch}, E] or one for all [E], or leave that linear out of target_modules."
            )
        return Routing(x.new_zeros(len(ids), 0), ids, weights), each


class ExpertForcing:
    """The part of a model with a mixture inside that takes the choice of experts out of its
    routers' hands.
    """

    @contextmanager
    def use_experts(
        self,
        experts: str | Iterable[str] | Mapping[str, float] | None = None,
        *,
        ban: str | Iterable[str] | None = None,
    ) -> Iterator[Any]:
        """While inside, every token uses these experts: a name, names (weight 1 each), or names
        with weights.

        ban: names that may not be chosen; without `experts` the routers choose among the rest, and
        where fewer than num_experts_per_tok remain, among those. Contexts nest: bans add up, inner
        experts replace outer ones.

        Raises:
            ValueError: an unknown name, no expert left, an expert that is both used and banned,
            weights that are
                not finite, or neither experts nor ban.
        """
        if experts is None and ban is None:
            raise ValueError(
                "use_experts() names nothing: give experts to use, or ban=… those not to choose."
            )
        mixture: Any = self.moelora  # type: ignore[attr-defined]
        config, device = mixture.config, self.device  # type: ignore[attr-defined]
        before = mixture.forcing
        now = Forcing() if before is None else before
        if experts is not None:
            now = _named(now, experts, config, device)
        mixture.forcing = _banning(now, ban, config, device)
        try:
            yield self
        finally:
            mixture.forcing = before


def forcing_of(model: Any, inputs: Mapping[str, Any], batch: int, length: int) -> Forcing | None:
    """What `inputs` of a forward (`expert_weights`, `banned_experts`) and `use_experts` around it
    decide, or None.

    Raises:
        ValueError, TypeError: weights of another shape or not finite, unknown names, or inputs at
        odds.
    """
    weights, ban = inputs["expert_weights"], inputs["banned_experts"]
    forcing, config = model.moelora.forcing, model.moelora_config
    if weights is not None:
        for other in ("expert_routing", "expert_targets"):
            if inputs[other] is not None:
                raise ValueError(
                    f"expert_weights leaves the routers nothing to do: drop it or {other}."
                )
        check_expert_weights(weights, batch, length, config.num_experts)
        forcing = _dense(Forcing() if forcing is None else forcing, weights)
    if weights is None and ban is None:
        return forcing
    return _banning(Forcing() if forcing is None else forcing, ban, config, model.device)


def check_expert_weights(weights: Any, batch: int, length: int, num_experts: int) -> None:
    """Raise TypeError or ValueError unless `weights` is finite and `[E]`, `[batch, E]` or `[batch,
    length, E]`.
    """
    if not isinstance(weights, Tensor) or weights.is_complex() or weights.dtype == torch.bool:
        found = weights.dtype if isinstance(weights, Tensor) else type(weights).__name__
        raise TypeError(
            f"expert_weights is a {found}; expected a tensor of real numbers, one an expert."
        )
    allowed = [(num_experts,), (batch, num_experts), (batch, length, num_experts)]
    if tuple(weights.shape) not in allowed:
        raise ValueError(
            f"expert_weights has shape {tuple(weights.shape)}; expected one of {allowed} for {num_experts} experts "
            f"and a batch of {batch} sequences of {length} tokens (padding included)."
        )
    if not bool(weights.isfinite().all()):
        raise ValueError(
            "expert_weights contains NaN or Inf; expected finite numbers, 0 for an unused expert."
        )


def step_weights(weights: Tensor, first: int, num_tokens: int) -> Tensor:
    """Of a prompt's weights `[batch, S, E]` those of `num_tokens` tokens from number `first` on.

    New tokens have the weights of the prompt's last one.
    """
    positions = torch.arange(first, first + num_tokens, device=weights.device)
    return weights[:, positions.clamp(max=weights.shape[1] - 1)]


def _dense(forcing: Forcing, weights: Tensor) -> Forcing:
    """`forcing` by weights `[…, E]`, which become slots: those in use, or where they learn, one for
    each expert.
    """
    rows = weights.reshape(-1, weights.shape[-1])
    rows = rows if rows.dtype == torch.float64 else rows.float()
    if rows.requires_grad:
        ids = torch.arange(rows.shape[1], device=rows.device).expand(len(rows), -1)
        return replace(forcing, expert_ids=ids, expert_weights=rows, complete=True)
    used = rows != 0
    slots = max(1, int(used.sum(1).max())) if len(rows) else 1
    ids = used.to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, :slots]
    # What is not in use has the weight 0 already.
    return replace(
        forcing,
        expert_ids=ids.masked_fill(~used.gather(1, ids), -1),
        expert_weights=rows.gather(1, ids),
        complete=False,
    )


def _named(
    forcing: Forcing,
    experts: str | Iterable[str] | Mapping[str, float],
    config: MoeLoraConfig,
    device: torch.device,
) -> Forcing:
    weights = {experts: 1.0} if isinstance(experts, str) else experts
    if not isinstance(weights, Mapping):
        weights = dict.fromkeys(weights, 1.0)
    if not weights:
        raise ValueError(
            f"use_experts names no expert; for the base alone write {{name: 0.0}}. The experts are: "
            f"{', '.join(config.expert_names or [])}."
        )
    ids = [config.expert_index(name) for name in weights]
    for name, weight in weights.items():
        check_number(f"the weight of expert {name!r}", weight, -math.inf, math.inf)
    return replace(
        forcing,
        expert_ids=torch.tensor([ids], dtype=torch.int64, device=device),
        expert_weights=torch.tensor([list(weights.values())], dtype=torch.float32, device=device),
        complete=True,
    )


def _banning(
    forcing: Forcing, ban: str | Iterable[str] | None, config: MoeLoraConfig, device: torch.device
) -> Forcing:
    """`forcing` with these experts banned too, if any is left and none of them is forced."""
    names = config.expert_names or []
    banned = (
        torch.zeros(config.num_experts, dtype=torch.bool)
        if forcing.banned is None
        else forcing.banned.cpu()
    )
    banned = banned.clone()
    for name in [ban] if isinstance(ban, str) else ban or ():
        banned[config.expert_index(name)] = True
    if not bool(banned.any()):
        return forcing
    if bool(banned.all()):
        raise ValueError(f"All experts are banned ({', '.join(names)}): leave one at least.")
    if forcing.expert_ids is not None and forcing.expert_weights is not None:
        # A weight of 0 uses nothing.
        used = (
            forcing.expert_ids[(forcing.expert_ids >= 0) & (forcing.expert_weights != 0)]
            .unique()
            .cpu()
        )
        if both := [names[e] for e in used.tolist() if banned[e]]:
            raise ValueError(f"{', '.join(both)} would be used and is banned: drop one of the two.")
    return replace(forcing, banned=banned.to(device))
