"""Sequence routing reads the prompt alone: which tokens those are, which labels take no loss."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..host_internals import assert_in_graph
from ..routers import Routing
from .inputs import batch_shape, token_mask
from .losses import IGNORE

CACHES = ("past_key_values", "cache_params")
# On a cache: the routing of the prompt whose keys and values it holds (of blending routers the
# prompt's part of it), or the outside context of its sequences. It goes where the cache goes, also
# where a caller hands on the cache alone (as an assistant, or under guidance_scale).
ON_CACHE = "moelora_expert_routing"
CONTEXT_ON_CACHE = "moelora_router_context"
PLANS = "moelora_plans"


class RequestPlans(dict):
    """Beside a routing on a cache: the plans of single tokens, which all tokens of a request share,
    with what they have gathered of the factors. A copy of the cache begins without any.
    """

    def __deepcopy__(self, memo: dict) -> RequestPlans:
        return RequestPlans()

    def __reduce__(self) -> tuple:
        return RequestPlans, ()


def read_prompt(
    kwargs: dict[str, Any],
    router_mask: Tensor | None,
    prefix_tokens: int,
    is_classifier: bool,
    answers: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """The prompts' tokens `[batch, length]` bool (None: all), and labels to take instead, or None.

    The prompt is `router_mask`; else, with labels, the attended tokens before a row's first label;
    where a row has labels from its start, its first `prefix_tokens` tokens, whose labels become
    −100; without labels all attended tokens.

    Args:
        kwargs: of the forward: tokens, attention_mask, labels, a cache, position_ids,
            num_items_in_batch.
        router_mask: `[batch, ≤ length]`, what the caller says the prompts are; or None.
        prefix_tokens: the length of the prompt of rows that have labels from their start.
        is_classifier: labels are one a sequence, and everything is prompt.
        answers: a loss is taken on what follows the prompts.

    Raises:
        ValueError, TypeError: the prompt cannot be known (labels taken out by the training loop, a
            filled cache without routing, packed sequences), `router_mask` has the wrong shape or
            an empty row, or no label is left to learn from.
    """
    labels = kwargs.get("labels")
    batch, length = batch_shape(kwargs)
    attended = token_mask(kwargs.get("attention_mask"), batch, length)
    in_training = answers or "num_items_in_batch" in kwargs
    if router_mask is None and labels is None and in_training and not is_classifier:
        raise ValueError(
            "routing_level='sequence' must know where the prompt ends, and this training loop "
            "takes the labels out (label smoothing or compute_loss_func do): pass router_mask "
            "[batch, length], True on prompt tokens."
        )
    _refuse_cached_and_packed(kwargs, in_training)
    if router_mask is not None:
        return _checked(router_mask, batch, length, attended), None
    if is_classifier or labels is None:
        return attended, None
    if attended is None:
        attended = torch.ones(batch, length, dtype=torch.bool, device=labels.device)
    before_labels = (labels != IGNORE).cumsum(1) == 0
    tokens = attended & before_labels
    prefix = attended & (attended.cumsum(1) <= prefix_tokens)
    from_start = ~tokens.any(1, keepdim=True)
    # A logit inside the prefix depends on the prefix tokens after it: it must not predict them.
    given = labels
    labels = labels.masked_fill(from_start & prefix, IGNORE)
    if answers and not torch.compiler.is_compiling():
        _check_labels_left(given, labels, prefix_tokens)
    return torch.where(from_start, prefix, tokens), labels


def _caches(holder: Any) -> list[Any]:
    """The caches among the keywords or the outputs of a forward that attributes can be set on."""
    caches = [holder.get(name) for name in CACHES] if hasattr(holder, "get") else []
    return [cache for cache in caches if hasattr(cache, "__dict__")]


def note_on_cache(outputs: Any, routing: tuple[Routing, ...]) -> None:
    """Write the prompt's routing on the cache that the outputs hold, if any."""
    for cache in _caches(outputs):
        if torch.compiler.is_compiling():
            # A graph knows no tuple again, and has no use for plans of the one before.
            setattr(cache, ON_CACHE, routing)
            setattr(cache, PLANS, None)
        elif getattr(cache, ON_CACHE, None) is not routing:
            setattr(cache, ON_CACHE, routing)
            setattr(cache, PLANS, RequestPlans())


def on_cache(outputs: Any) -> bool:
    """Whether a cache that the outputs hold carries what routers made of its prompt."""
    return any(getattr(cache, ON_CACHE, None) for cache in _caches(outputs))


def note_context_on_cache(outputs: Any, given: Tensor) -> None:
    """Write the outside context `[batch, n]` on the cache that the outputs hold, if any."""
    for cache in _caches(outputs):
        setattr(cache, CONTEXT_ON_CACHE, given.detach())


def context_on_cache(kwargs: dict[str, Any], batch: int) -> Tensor | None:
    """The outside context that a filled cache among the arguments has for `batch` rows, or None."""
    for cache in _caches(kwargs):
        noted = getattr(cache, CONTEXT_ON_CACHE, None)
        if noted is not None and len(noted) == batch and cached_tokens(kwargs):
            return noted
    return None


def plans_on_cache(
    kwargs: dict[str, Any], routing: tuple[Routing, ...] | None
) -> RequestPlans | None:
    """The plans beside `routing` on a cache among the arguments, or None."""
    if routing is None or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return None
    for cache in _caches(kwargs):
        if getattr(cache, ON_CACHE, None) is routing:
            return getattr(cache, PLANS, None)
    return None


def carried_by_cache(
    kwargs: dict[str, Any], batch: int, router_mask: Tensor | None = None
) -> tuple[Routing, ...] | None:
    """The routing that a filled cache among the arguments carries for `batch` rows, or None.

    A `router_mask` asks for another choice, which the cache's tokens were not computed with.
    """
    for cache in _caches(kwargs):
        routing = getattr(cache, ON_CACHE, None)
        if routing and len(routing[0].expert_ids) == batch and cached_tokens(kwargs):
            return routing if router_mask is None else None
    return None


def cached_tokens(kwargs: dict[str, Any]) -> bool:
    """Whether a cache among the arguments holds tokens already."""
    for cache in _caches(kwargs):
        for question in ("get_seq_length", "has_previous_state"):
            try:
                answer = getattr(cache, question)
                if answer() if callable(answer) else answer:
                    return True
            except (AttributeError, ValueError):
                # Caches of attention answer the first question, of state space models the second.
                continue
    return False


def _refuse_cached_and_packed(kwargs: dict[str, Any], in_training: bool) -> None:
    if cached_tokens(kwargs):
        raise ValueError(
            "routing_level='sequence' with a filled cache needs the prompt's routing: pass "
            "expert_routing=outputs.expert_routing of the prompt's forward (generate() does this "
            "by itself)."
        )
    positions = kwargs.get("position_ids")
    restarted = False
    if in_training and isinstance(positions, Tensor):
        restarted = bool(((positions[..., 1:] == 0) & (positions[..., :-1] > 0)).any())
    # Continuous batching and flattened batches mark their sequences by where they begin.
    if restarted or kwargs.get("cu_seq_lens_q") is not None:
        raise ValueError(
            "These rows are packed (position_ids start again inside a row, or cu_seq_lens_q is "
            "given), so a row has no single prompt: use routing_level='token', one sequence a row, "
            "or pass expert_routing."
        )


def _check_labels_left(given: Tensor, labels: Tensor, prefix_tokens: int) -> None:
    """Raise ValueError where the prefix prompts have taken every label of the batch."""
    kept = bool((labels != IGNORE).any())
    if not kept and bool((given != IGNORE).any()):
        raise ValueError(
            f"No label is left in this batch: its texts have labels from their start and are no "
            f"longer than router_prefix_tokens={prefix_tokens}, the part that the sequence router "
            "reads and that takes no loss. Set router_prefix_tokens lower (from_pretrained takes "
            "it too), leave shorter texts out or join them, or say where the prompts end: labels "
            "of −100 on prompt tokens, or router_mask [batch, length]."
        )


def _checked(router_mask: Any, batch: int, length: int, attended: Tensor | None) -> Tensor:
    if not isinstance(router_mask, Tensor):
        raise TypeError(
            f"router_mask is a {type(router_mask).__name__}; expected a tensor [batch, length], "
            "True on prompt tokens."
        )
    if router_mask.dim() != 2 or len(router_mask) != batch or router_mask.shape[1] > length:
        raise ValueError(
            f"router_mask has shape {tuple(router_mask.shape)}; expected [{batch}, {length}] (or "
            "shorter: what follows does not belong to the prompt)."
        )
    mask = torch.nn.functional.pad(router_mask.bool(), (0, length - router_mask.shape[1]))
    if attended is not None:
        mask = mask & attended
    needed = "each row needs a prompt of one token at least. Leave such rows out, or mark their"
    if torch.compiler.is_compiling():
        problem = f"router_mask marks no attended token in a row: {needed} first tokens."
        assert_in_graph(mask.any(1).all(), problem)
    elif empty := (~mask.any(1)).nonzero().flatten().tolist():
        rows = ", ".join(map(str, empty))
        raise ValueError(
            f"router_mask marks no attended token in row {rows}: {needed} first tokens."
        )
    return mask
