"""What `generate()` carries from step to step: weights of experts, and the prompt's routing.

It travels in the model's keyword arguments and on the cache, so beams, several return sequences and
an assistant each see their own; nothing is kept on the model.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from einops import repeat
from torch import Tensor

from ..routers import Routing
from .mixture import Mixture
from .overrides import check_expert_weights, step_weights
from .prompts import carried_by_cache

CARRIED = (
    "router_mask",
    "expert_routing",
    "output_expert_routing",
    "expert_weights",
    "banned_experts",
)


def overrides(base: type, ours: Any) -> dict[str, Callable]:
    """The methods that `generate()` calls, for the class of models with a mixture inside.

    Args:
        base: the base's class, which can generate.
        ours: the class of ours that comes before it in the order of method resolution.
    """

    def prepare_inputs_for_generation(self, *args, **kwargs):
        prepare = super(ours, self).prepare_inputs_for_generation
        return step_inputs(prepare, args, kwargs)

    def _expand_inputs_for_generation(
        self, expand_size=1, is_encoder_decoder=False, input_ids=None, **model_kwargs
    ):
        expand = super(ours, self)._expand_inputs_for_generation
        expand = partial(expand, is_encoder_decoder=is_encoder_decoder)
        return expanded_inputs(self.moelora, expand, expand_size, input_ids, model_kwargs)

    def _update_model_kwargs_for_generation(self, outputs, model_kwargs, *args, **kwargs):
        update = super(ours, self)._update_model_kwargs_for_generation
        model_kwargs = update(outputs, model_kwargs, *args, **kwargs)
        return keep_routing(self.moelora, outputs, model_kwargs)

    def _prefill(self, input_ids, generation_config, model_kwargs, *args, **kwargs):
        refuse_chunks(self.moelora, generation_config.prefill_chunk_size, model_kwargs)
        prefill = super(ours, self)._prefill
        return prefill(input_ids, generation_config, model_kwargs, *args, **kwargs)

    def _get_candidate_generator(self, *args, model_kwargs, **kwargs):
        # An assistant, also this model's own first layers, routes the prompt itself if it routes,
        # and keeps that on its own cache.
        others = {name: value for name, value in model_kwargs.items() if name not in CARRIED}
        return super(ours, self)._get_candidate_generator(*args, model_kwargs=others, **kwargs)

    # generate() looks here whether it may be given inputs_embeds.
    signature = inspect.signature(base.prepare_inputs_for_generation)  # type: ignore[attr-defined]
    prepare_inputs_for_generation.__signature__ = signature  # type: ignore[attr-defined]
    return {
        function.__name__: function
        for function in (
            prepare_inputs_for_generation,
            _expand_inputs_for_generation,
            _update_model_kwargs_for_generation,
            _prefill,
            _get_candidate_generator,
        )
    }


def step_inputs(prepare: Callable, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The base's inputs of a step, and what the routers need also where the base drops keywords.

    expert_weights `[E]` and `[batch, E]` hold for all tokens; `[batch, S, E]` covers the prompt
    (padding included), and new tokens have the weights of its last token.
    """
    own = {name: kwargs.pop(name) for name in CARRIED if name in kwargs}
    inputs = prepare(*args, **kwargs)
    weights = own.get("expert_weights")
    if weights is not None and weights.dim() == 3:
        tokens = inputs.get("input_ids")
        tokens = inputs["inputs_embeds"] if tokens is None else tokens
        own["expert_weights"] = step_weights(weights, _cached(weights, kwargs), tokens.shape[1])
    return {**inputs, **{name: value for name, value in own.items() if value is not None}}


def expanded_inputs(
    mixture: Mixture,
    expand: Callable,
    size: int,
    input_ids: Tensor | None,
    model_kwargs: dict[str, Any],
) -> tuple[Tensor | None, dict[str, Any]]:
    """The inputs with each row `size` times, and the prompt marked: later steps append to it."""
    weights = model_kwargs.get("expert_weights")
    prompt = _prompt(input_ids, model_kwargs)
    if weights is not None:
        check_expert_weights(weights, len(prompt), prompt.shape[1], mixture.num_experts)
        if weights.dim() == 1:
            # Every tensor is taken for one with a batch dimension.
            model_kwargs.pop("expert_weights")
    carried = model_kwargs.get("expert_routing") or carried_by_cache(model_kwargs, len(prompt))
    if _reads_prompts(mixture, model_kwargs) and carried is None:
        model_kwargs.setdefault("router_mask", prompt)
    routing = model_kwargs.pop("expert_routing", None)
    input_ids, model_kwargs = expand(expand_size=size, input_ids=input_ids, **model_kwargs)
    if routing is not None:
        model_kwargs["expert_routing"] = tuple(
            Routing(*(repeat(t, "rows k -> (rows times) k", times=size) for t in own))
            for own in routing
        )
    if weights is not None:
        model_kwargs.setdefault("expert_weights", weights)
    return input_ids, model_kwargs


def keep_routing(mixture: Mixture, outputs: Any, model_kwargs: dict[str, Any]) -> dict[str, Any]:
    """Keep the prompt's routing for all later steps."""
    if _reads_prompts(mixture, model_kwargs):
        model_kwargs["expert_routing"] = outputs.expert_routing
        model_kwargs.pop("router_mask", None)
    return model_kwargs


def refuse_chunks(mixture: Mixture, chunk_size: int | None, model_kwargs: dict[str, Any]) -> None:
    """Raise ValueError where a prompt that must be read as a whole would be cut."""
    if chunk_size is not None and _reads_prompts(mixture, model_kwargs):
        raise ValueError(
            "prefill_chunk_size cuts the prompt, which routing_level='sequence' must read as a "
            "whole: drop it."
        )


def _reads_prompts(mixture: Mixture, model_kwargs: dict[str, Any]) -> bool:
    return not mixture.by_token and model_kwargs.get("expert_weights") is None


def _cached(weights: Tensor, kwargs: dict[str, Any]) -> int:
    """How many tokens lie before this step's; the prompt's have the weights `[batch, S, E]`."""
    cache = kwargs.get("past_key_values")
    if cache is not None:
        return int(cache.get_seq_length())
    if kwargs.get("cache_params") is None or kwargs.get("is_first_iteration"):
        return 0
    # Caches of state space models count no tokens; after the first step there are new ones alone.
    return weights.shape[1]


def _prompt(input_ids: Tensor | None, model_kwargs: dict[str, Any]) -> Tensor:
    """The prompt's tokens, `[batch, length]` bool: what is attended to when generation begins."""
    mask = model_kwargs.get("attention_mask")
    if isinstance(mask, Tensor) and mask.dim() == 2:
        return mask.bool()
    tokens = model_kwargs.get("inputs_embeds")
    if tokens is None or (input_ids is not None and input_ids.shape[1] > 0):
        tokens = input_ids
    assert tokens is not None
    return torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
