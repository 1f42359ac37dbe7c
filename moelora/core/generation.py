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
from torch import Tensor
from transformers import UnbatchedClassifierFreeGuidanceLogitsProcessor

from ..routers import Routing
from .inputs import OWN_INPUTS, check_expert_weights
from .mixture import Mixture
from .overrides import entered_override
from .prompts import carried_by_cache, on_cache

# Nothing is learned while generating.
CARRIED = [name for name in OWN_INPUTS if name != "expert_targets"]
# What does not depend on the prompt, and so holds for an unconditional prompt too.
OF_ANY_PROMPT = ("expert_weights", "banned_experts", "router_context")

INSTEAD = (
    "call generate() instead (`transformers serve` does without --continuous-batching), or route "
    "single tokens by what they are (routing_level='token', a router that reads no prompt and no "
    "context)."
)


class Generating:
    """The methods that `generate()` calls, between ours and those of a base that can generate."""

    moelora: Mixture

    def prepare_inputs_for_generation(self, *args, **kwargs):
        """The base's inputs of a step, and what routers need also where the base drops keywords.

        expert_weights `[E]` and `[batch, E]` hold for all tokens; `[batch, S, E]` covers the prompt
        (padding included), and new tokens have the weights of its last token.
        """
        own = {name: kwargs.pop(name) for name in CARRIED if name in kwargs}
        inputs = super().prepare_inputs_for_generation(*args, **kwargs)  # type: ignore[misc]
        weights = own.get("expert_weights")
        if weights is not None and weights.dim() == 3:
            tokens = inputs.get("input_ids")
            tokens = inputs["inputs_embeds"] if tokens is None else tokens
            own["expert_weights"] = _step_weights(weights, kwargs, tokens.shape[1])
        return {**inputs, **{name: value for name, value in own.items() if value is not None}}

    def _expand_inputs_for_generation(
        self, expand_size=1, is_encoder_decoder=False, input_ids=None, **model_kwargs
    ):
        """Each row `expand_size` times, and the prompt marked: later steps append to it."""
        mixture = self.moelora
        weights = model_kwargs.get("expert_weights")
        prompt = _prompt(input_ids, model_kwargs)
        if weights is not None:
            check_expert_weights(weights, len(prompt), prompt.shape[1], mixture.num_experts)
            if weights.dim() == 1:
                # Every tensor is taken for one with a batch dimension.
                model_kwargs.pop("expert_weights")
        carried = carried_by_cache(model_kwargs, len(prompt))
        if mixture.routes_prompts:
            carried = model_kwargs.get("expert_routing") or carried
        if _reads_prompts(mixture, model_kwargs) and carried is None:
            model_kwargs.setdefault("router_mask", prompt)
        routing = model_kwargs.pop("expert_routing", None)
        if routing is not None and not mixture.routes_prompts:
            raise ValueError(
                "expert_routing is of single tokens here, and generate() makes new ones that it "
                "does not cover: pass expert_weights, or use routing_level='sequence'."
            )
        expand = super()._expand_inputs_for_generation  # type: ignore[misc]
        input_ids, model_kwargs = expand(
            expand_size=expand_size,
            is_encoder_decoder=is_encoder_decoder,
            input_ids=input_ids,
            **model_kwargs,
        )
        if routing is not None:
            model_kwargs["expert_routing"] = tuple(
                Routing(*(t.repeat_interleave(expand_size, dim=0) for t in own)) for own in routing
            )
        if weights is not None:
            model_kwargs.setdefault("expert_weights", weights)
        return input_ids, model_kwargs

    def _update_model_kwargs_for_generation(self, outputs, model_kwargs, *args, **kwargs):
        """Keep the prompt's routing for all later steps."""
        update = super()._update_model_kwargs_for_generation  # type: ignore[misc]
        model_kwargs = update(outputs, model_kwargs, *args, **kwargs)
        if not _reads_prompts(self.moelora, model_kwargs):
            return model_kwargs
        if self.moelora.routes_prompts:
            model_kwargs["expert_routing"] = outputs.expert_routing
            model_kwargs.pop("router_mask", None)
        elif on_cache(outputs):
            # Without a cache each step reads the prompt again, among all tokens so far.
            model_kwargs.pop("router_mask", None)
        return model_kwargs

    def _prefill(self, input_ids, generation_config, model_kwargs, *args, **kwargs):
        if generation_config.prefill_chunk_size is not None and _reads_prompts(
            self.moelora, model_kwargs
        ):
            raise ValueError(
                "prefill_chunk_size cuts the prompt, which routing_level='sequence' and "
                "router='hybrid' must read as a whole: drop it."
            )
        prefill = super()._prefill  # type: ignore[misc]
        return prefill(input_ids, generation_config, model_kwargs, *args, **kwargs)

    def _get_logits_processor(self, *args, logits_processor=None, model_kwargs=None, **kwargs):
        """As the base's; with guidance_scale the unconditional pass has our inputs too."""
        own = {name: (model_kwargs or {}).get(name) for name in OF_ANY_PROMPT}
        own = {name: value for name, value in own.items() if value is not None}
        get = super()._get_logits_processor  # type: ignore[misc]
        processors = get(
            *args, logits_processor=logits_processor, model_kwargs=model_kwargs, **kwargs
        )
        given = {id(processor) for processor in logits_processor or []}
        for processor in processors:
            guides = isinstance(processor, UnbatchedClassifierFreeGuidanceLogitsProcessor)
            if own and guides and id(processor) not in given:
                _check_guidance(own.get("expert_weights"))
                processor.model = partial(processor.model, **own)
        return processors

    def _supports_logits_to_keep(self):
        # An adapted head would choose by the one token that it is shown, not by the prompt.
        mixture = self.moelora
        reads_all = mixture.reads_prompts or mixture.router_list[0].reads == "input_ids"
        if reads_all and any(site.layer is None for site in mixture.sites.values()):
            return False
        return super()._supports_logits_to_keep()  # type: ignore[misc]

    def _get_candidate_generator(self, *args, model_kwargs, **kwargs):
        # An assistant, also this model's own first layers, routes the prompt itself if it routes,
        # and keeps that on its own cache. What is outside it is told.
        others = {name: value for name, value in model_kwargs.items() if name not in CARRIED}
        outside = model_kwargs.get("router_context")
        helper = getattr(kwargs.get("assistant_model") or self, "moelora", None)
        if outside is not None and helper is not None and helper.reads_context(outside.shape[-1]):
            others["router_context"] = outside
        generator = super()._get_candidate_generator  # type: ignore[misc]
        return generator(*args, model_kwargs=others, **kwargs)

    def generate_batch(self, inputs, *args, **kwargs):
        """As the base's (continuous batching), which passes no inputs of ours on.

        Args:
            inputs: the prompts, lists of token ids.

        Raises:
            ValueError: inputs of ours, or as `init_continuous_batching`.
        """
        if own := [name for name in OWN_INPUTS if kwargs.get(name) is not None]:
            raise ValueError(
                f"{', '.join(own)}: continuous batching hands the model its tokens alone, so this "
                "would not be used: call generate() instead."
            )
        return super().generate_batch(inputs, *args, **kwargs)  # type: ignore[misc]

    def init_continuous_batching(self, *args, **kwargs):
        """As the base's: requests come and go while the model runs on all of them, in one row.

        Raises:
            ValueError: the routers need more than the tokens of that row, or this is inside of
                `use_experts`, which the thread that computes does not see.
        """
        _check_batching(self.moelora)
        return super().init_continuous_batching(*args, **kwargs)  # type: ignore[misc]


def step_signature(base: type) -> Callable:
    """`prepare_inputs_for_generation` with the base's signature, in which `generate()` looks
    whether it may be given inputs_embeds.
    """

    def prepare_inputs_for_generation(self, *args, **kwargs):
        return Generating.prepare_inputs_for_generation(self, *args, **kwargs)

    signature = inspect.signature(base.prepare_inputs_for_generation)  # type: ignore[attr-defined]
    prepare_inputs_for_generation.__signature__ = signature  # type: ignore[attr-defined]
    return prepare_inputs_for_generation


def _check_batching(mixture: Mixture) -> None:
    """Raise where continuous batching would compute something else than `generate()`."""
    if mixture.reads_prompts:
        # What the model is called with names no request, and no prompt of which it is a chunk.
        raise ValueError(
            "Continuous batching lays the tokens of all requests into one row, prompts in chunks, "
            "and does not say whose they are, and these routers read whole prompts "
            f"(router={mixture.config.router!r}, "
            f"routing_level={mixture.config.routing_level!r}): {INSTEAD}"
        )
    if mixture.router_list[0].reads == "context":
        raise ValueError(
            "Continuous batching hands the model its tokens alone, and router='context' reads "
            f"router_context: {INSTEAD}"
        )
    if entered_override(mixture) is not None:
        raise ValueError(
            "use_experts holds in the thread that entered it, and continuous batching computes in "
            "a thread of its own, so it would not be used: call generate(), or leave use_experts."
        )


def _check_guidance(weights: Tensor | None) -> None:
    """Raise where the weights of experts cannot hold for an unconditional prompt."""
    if weights is not None and weights.dim() == 3:
        raise ValueError(
            f"guidance_scale reads another prompt beside this one, and expert_weights "
            f"{list(weights.shape)} say what single tokens of this one use: pass expert_weights "
            "[E] or [batch, E]."
        )


def _reads_prompts(mixture: Mixture, model_kwargs: dict[str, Any]) -> bool:
    return mixture.reads_prompts and model_kwargs.get("expert_weights") is None


def _step_weights(weights: Tensor, kwargs: dict[str, Any], num_tokens: int) -> Tensor:
    """Of a prompt's weights `[batch, S, E]` those of this step's tokens.

    New tokens have the weights of the prompt's last one.
    """
    cache = kwargs.get("past_key_values")
    first = 0
    if cache is not None:
        first = int(cache.get_seq_length())
    elif kwargs.get("cache_params") is not None and not kwargs.get("is_first_iteration"):
        # Caches of state space models count no tokens; after the first step all are new.
        first = weights.shape[1]
    positions = torch.arange(first, first + num_tokens, device=weights.device)
    return weights[:, positions.clamp(max=weights.shape[1] - 1)]


def _prompt(input_ids: Tensor | None, model_kwargs: dict[str, Any]) -> Tensor:
    """The prompt's tokens, `[batch, length]` bool: what is attended to when generation begins."""
    mask = model_kwargs.get("attention_mask")
    if isinstance(mask, Tensor) and mask.dim() == 2:
        return mask.bool()
    embedded = model_kwargs.get("inputs_embeds")
    has_ids = input_ids is not None and input_ids.shape[1] > 0
    tokens: Any = input_ids if has_ids or embedded is None else embedded
    return torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
