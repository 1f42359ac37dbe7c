"""What `generate()` carries from step to step: forced weights, and at sequence level the prompt's
mask, then routing.

It travels in the model's keyword arguments, so beams, several return sequences and an assistant
each see their own; nothing is kept on the model.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .overrides import check_expert_weights, step_weights

CARRIED = (
    "router_mask",
    "expert_routing",
    "output_expert_routing",
    "expert_weights",
    "banned_experts",
)


class MoeLoraGeneration:
    """Overrides of `GenerationMixin` for forced weights and sequence-level routing; nothing else is
    carried.

    expert_weights `[E]` and `[batch, E]` hold for all tokens; `[batch, S, E]` covers the prompt
    (padding included), and new tokens have the weights of its last token.
    """

    def _routes_sequences(self) -> bool:
        return self.moelora.config.routing_level == "sequence"  # type: ignore[attr-defined]

    def prepare_inputs_for_generation(self, *args, **kwargs) -> dict[str, Any]:
        """The base's inputs, with what the routers need also where the base drops unknown keywords."""
        own = {name: kwargs.pop(name) for name in CARRIED if name in kwargs}
        inputs = super().prepare_inputs_for_generation(*args, **kwargs)  # type: ignore[misc]
        weights = own.get("expert_weights")
        if weights is not None and weights.dim() == 3:
            tokens = inputs.get("input_ids")
            tokens = inputs["inputs_embeds"] if tokens is None else tokens
            own["expert_weights"] = step_weights(weights, _cached(weights, kwargs), tokens.shape[1])
        return {**inputs, **{name: value for name, value in own.items() if value is not None}}

    def _expand_inputs_for_generation(
        self, expand_size=1, is_encoder_decoder=False, input_ids=None, **model_kwargs
    ):
        """Mark the prompt before anything is appended to it: assisted decoding's first forward
        holds candidates.
        """
        weights = model_kwargs.get("expert_weights")
        if weights is not None:
            check_expert_weights(
                weights, *_prompt(input_ids, model_kwargs).shape, self.moelora.num_experts
            )  # type: ignore[attr-defined]
            if weights.dim() == 1:
                # Every tensor is taken for one with a batch dimension.
                model_kwargs.pop("expert_weights")
        if (
            self._routes_sequences()
            and weights is None
            and model_kwargs.get("expert_routing") is None
            and model_kwargs.get("router_mask") is None
        ):
            model_kwargs["router_mask"] = _prompt(input_ids, model_kwargs)
        routing = model_kwargs.pop("expert_routing", None)
        input_ids, model_kwargs = super()._expand_inputs_for_generation(  # type: ignore[misc]
            expand_size=expand_size,
            is_encoder_decoder=is_encoder_decoder,
            input_ids=input_ids,
            **model_kwargs,
        )
        if routing is not None:
            repeat = [
                type(r)(*(t.repeat_interleave(expand_size, dim=0) for t in r)) for r in routing
            ]
            model_kwargs["expert_routing"] = tuple(repeat)
        if weights is not None:
            model_kwargs.setdefault("expert_weights", weights)
        return input_ids, model_kwargs

    def _update_model_kwargs_for_generation(self, outputs, model_kwargs, *args, **kwargs):
        """Keep the prompt's routing for all later steps."""
        model_kwargs = super()._update_model_kwargs_for_generation(
            outputs, model_kwargs, *args, **kwargs
        )  # type: ignore[misc]
        if self._routes_sequences() and model_kwargs.get("expert_weights") is None:
            model_kwargs["expert_routing"] = outputs.expert_routing
            model_kwargs.pop("router_mask", None)
        return model_kwargs

    def _prefill(self, input_ids, generation_config, model_kwargs, *args, **kwargs):
        if (
            self._routes_sequences()
            and model_kwargs.get("expert_weights") is None
            and generation_config.prefill_chunk_size is not None
        ):
            raise ValueError(
                "prefill_chunk_size cuts the prompt, which routing_level='sequence' must read as a whole: drop it."
            )
        return super()._prefill(input_ids, generation_config, model_kwargs, *args, **kwargs)  # type: ignore[misc]

    def _get_candidate_generator(
        self,
        generation_config,
        input_ids,
        inputs_tensor,
        logits_processor,
        model_kwargs,
        assistant_model=None,
        **kwargs,
    ):
        """Hand the assistant its own routing of the prompt, if it is such a model, and never this
        model's.
        """
        for_assistant = model_kwargs
        if assistant_model is not None:
            for_assistant = {k: v for k, v in model_kwargs.items() if k not in CARRIED}
            if (
                isinstance(assistant_model, MoeLoraGeneration)
                and assistant_model._routes_sequences()
            ):
                for_assistant["expert_routing"] = assistant_model._route_prompt(
                    input_ids, model_kwargs
                )
        return super()._get_candidate_generator(  # type: ignore[misc]
            generation_config=generation_config,
            input_ids=input_ids,
            inputs_tensor=inputs_tensor,
            logits_processor=logits_processor,
            model_kwargs=for_assistant,
            assistant_model=assistant_model,
            **kwargs,
        )

    @torch.no_grad()
    def _route_prompt(self, input_ids: Tensor, model_kwargs: dict[str, Any]) -> tuple:
        """This model's routing of a prompt; an assistant is called once a round and keeps nothing
        but its cache.
        """
        device = self.device  # type: ignore[attr-defined]
        mask = _prompt(input_ids, model_kwargs).to(device)
        return self(input_ids=input_ids.to(device), attention_mask=mask.long()).expert_routing  # type: ignore[operator]


def _cached(weights: Tensor, kwargs: dict[str, Any]) -> int:
    """How many tokens lie before this step's, of which the prompt has the weights `[batch, S, E]`."""
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
