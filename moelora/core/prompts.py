"""Sequence-level routing reads the prompt alone: which tokens those are, and which labels then take
no loss.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..config import MoeLoraConfig
from .forward_pass import ForwardState
from .losses import IGNORE


def prompt_and_labels(
    state: ForwardState,
    kwargs: dict[str, Any],
    router_mask: Tensor | None,
    config: MoeLoraConfig,
    is_classifier: bool,
    learning: bool,
) -> None:
    """Set `state.prompt_mask` `[batch, length]` for a sequence router, and mask labels inside a
    prefix prompt.

    The prompt is `router_mask`; else, with labels, the attended tokens before a row's first label;
    where a row has labels from its start, its first `router_prefix_tokens` tokens, whose labels are
    set to −100; without labels all attended tokens.

    Raises:
        ValueError: the prompt cannot be known: labels taken out by the training loop, a cache
        without
            `expert_routing`, packed sequences; or `router_mask` has the wrong shape or an empty
            row.
    """
    if state.carried is not None:
        _check_carried(state)
        return
    _refuse_unknowable(
        kwargs, state, learning or "num_items_in_batch" in kwargs, router_mask, is_classifier
    )
    if router_mask is not None:
        state.prompt_mask = _checked(router_mask, state)
        return
    labels = kwargs.get("labels")
    if is_classifier or labels is None:
        state.prompt_mask = state.token_mask
        return
    attended = state.token_mask
    if attended is None:
        attended = torch.ones(state.batch, state.length, dtype=torch.bool, device=labels.device)
    before_labels = (labels != IGNORE).cumsum(1) == 0
    prompt = attended & before_labels
    prefix = attended & (attended.cumsum(1) <= config.router_prefix_tokens)
    from_start = ~prompt.any(1, keepdim=True)
    state.prompt_mask = torch.where(from_start, prefix, prompt)
    # A logit inside the prefix depends on the prefix tokens after it, so it must not be asked to
    # predict them.
    kwargs["labels"] = labels.masked_fill(from_start & prefix, IGNORE)


def _refuse_unknowable(
    kwargs: dict[str, Any],
    state: ForwardState,
    in_training: bool,
    router_mask: Tensor | None,
    is_classifier: bool,
) -> None:
    if router_mask is None and in_training and kwargs.get("labels") is None and not is_classifier:
        raise ValueError(
            "routing_level='sequence' must know where the prompt ends, and this training loop takes the labels out "
            "(label smoothing or compute_loss_func do): pass router_mask [batch, length], True on prompt tokens."
        )
    if _cached_tokens(kwargs):
        raise ValueError(
            "routing_level='sequence' with a filled cache needs the prompt's routing: pass "
            "expert_routing=outputs.expert_routing of the prompt's forward (generate() does this by itself)."
        )
    positions = kwargs.get("position_ids")
    if in_training and isinstance(positions, Tensor) and _start_again(positions):
        raise ValueError(
            "These rows are packed (position_ids start again inside a row), so a row has no single prompt: "
            "use routing_level='token', or one sequence a row."
        )


def _start_again(positions: Tensor) -> bool:
    """Whether position_ids `[…, length]` fall back to 0 inside a row."""
    return bool(((positions[..., 1:] == 0) & (positions[..., :-1] > 0)).any())


def _cached_tokens(kwargs: dict[str, Any]) -> bool:
    """Whether a cache among the arguments holds tokens already."""
    for name in ("past_key_values", "cache_params"):
        for question in ("get_seq_length", "has_previous_state"):
            try:
                answer = getattr(kwargs.get(name), question)
                if answer() if callable(answer) else answer:
                    return True
            except (AttributeError, ValueError):
                # Caches of attention answer the first question, of state space models the second.
                continue
    return False


def _checked(router_mask: Tensor, state: ForwardState) -> Tensor:
    if (
        router_mask.dim() != 2
        or router_mask.shape[0] != state.batch
        or router_mask.shape[1] > state.length
    ):
        raise ValueError(
            f"router_mask has shape {tuple(router_mask.shape)}; expected [{state.batch}, {state.length}] "
            "(or shorter: what follows is no prompt)."
        )
    mask = torch.nn.functional.pad(router_mask.bool(), (0, state.length - router_mask.shape[1]))
    if state.token_mask is not None:
        mask = mask & state.token_mask
    empty = (~mask.any(1)).nonzero().flatten().tolist()
    if empty:
        raise ValueError(
            f"router_mask marks no attended token in row {', '.join(map(str, empty))}: each row needs a prompt of "
            "one token at least. Leave such rows out, or mark their first tokens."
        )
    return mask


def _check_carried(state: ForwardState) -> None:
    assert state.carried is not None
    rows = state.carried[0].expert_ids.shape[0] if state.carried else 0
    if rows != state.batch:
        raise ValueError(
            f"expert_routing has {rows} rows for a batch of {state.batch}; pass the routing of their prompts."
        )
