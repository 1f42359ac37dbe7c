"""`MoeLoraForCausalLM` as vLLM sees it: the base as vLLM builds it, with the mixture inside."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.forward_context import get_forward_context
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
from vllm.model_executor.models.interfaces import (
    has_inner_state,
    is_attention_free,
    is_hybrid,
    supports_multimodal,
)
from vllm.model_executor.models.utils import init_vllm_registered_model, maybe_prefix

from .attach import attach
from .choices import tracker_of
from .loading import BASE_PREFIX, Checkpoint, Loading, open_checkpoint
from .requests import KEY, Rows
from .settings import own_settings
from .step import Step
from .tracker_v2 import state_class

TRANSFORMERS = "TransformersForCausalLM"


class MoeLoraForCausalLM(nn.Module):
    """A base of any architecture that vLLM knows, with a mixture of LoRA experts inside.

    Args:
        vllm_config: of the engine.
        prefix: of its modules' names.
    """

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        super().__init__()
        model = vllm_config.model_config
        self.vllm_config = vllm_config
        self.settings = own_settings(vllm_config)
        self.checkpoint = open_checkpoint(model.hf_config, model.model, model.revision)
        self.config = self.checkpoint.config
        where, keywords = self.config.where_base()
        source = DefaultModelLoader.Source(
            where, keywords.get("revision"), keywords.get("subfolder"), prefix=BASE_PREFIX
        )
        self.secondary_weights = [source]
        through_transformers = self.settings["transformers_backend"]
        self.base = init_vllm_registered_model(
            vllm_config,
            prefix=maybe_prefix(prefix, "base"),
            hf_config=self.config.base(),
            architectures=[TRANSFORMERS if through_transformers else self._architecture()],
        )
        _check_base(self.base)
        self.attached = attach(self.base, self.config, vllm_config)
        self.moelora = self.attached.mixture
        self.by_request = not self.moelora.by_token or self.moelora.reads_prompts
        self.was_checked = False

    def _architecture(self) -> str:
        names = self.config.base().architectures or [self.config.base_architecture]
        return str(names[0])

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        """The embeddings of tokens.

        Args:
            input_ids: `[T]`.
        """
        return self.base.embed_input_ids(input_ids)  # type: ignore[operator]

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        ids = None if input_ids is None else input_ids[None]
        step = Step(self.moelora, 1, token_ids=ids, rows=self._rows())
        hidden = step.run(
            lambda: self.base(input_ids, positions, intermediate_tensors, inputs_embeds, **kwargs)
        )
        if not self.was_checked:
            self._check_callers()
        return hidden

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        """The logits of tokens.

        Args:
            hidden_states: `[T, d]`.
        """
        return self.base.compute_logits(hidden_states)  # type: ignore[operator]

    @torch.no_grad()
    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Load what a checkpoint holds, and the base where it is among the weights.

        Args:
            weights: tensors by their keys in the checkpoint; the base's begin with "base.".

        Raises:
            ValueError: the checkpoint does not fit, or the base is not the one it belongs to.
        """
        any_base = self.settings["allow_base_mismatch"]
        return Loading(self.base, self.attached, self.checkpoint, any_base).load(weights)

    def load_experts(self, folder: str) -> None:
        """Take the experts, routers and saved modules of another checkpoint of the same mixture.

        Args:
            folder: which `save_pretrained` wrote.

        Raises:
            ValueError: it is of another mixture or another base; nothing has changed then.
        """
        loading = Loading(self.base, self.attached, self.checkpoint, False)
        self.checkpoint = loading.replace(folder)

    def get_model_state_cls(self) -> type:
        """What vLLM's V2 runner tells of requests: the base's own state, with a tracker."""
        # Not where the V1 runner is: what it imports needs Triton.
        from vllm.v1.worker.gpu.model_states import resolve_model_state_cls

        own = resolve_model_state_cls(self.vllm_config, self.base)
        return state_class(own, tracker_of(self.vllm_config.model_config.logits_processors).read)

    def _rows(self) -> list[Rows] | None:
        """Whose rows this step has, where that makes a difference."""
        context = get_forward_context()
        requests = context.no_compile_layers.get(KEY)
        asked = requests is not None and any(
            request.choice is not None for request in requests.under_way()
        )
        if not self.by_request and not asked:
            return None
        return [] if requests is None else requests.rows(context.attn_metadata)

    def _check_callers(self) -> None:
        """Raise RuntimeError where vLLM's model does not call an adapted linear, as some fold a
        linear's weight into another one.
        """
        missed = [key for key, caller in self.attached.callers.items() if not caller.was_called]
        if missed:
            raise RuntimeError(
                f"vLLM's {type(self.base).__name__} computes without calling {missed[0]} "
                f"({len(missed)} of {len(self.attached.callers)}), so its experts would do "
                "nothing: leave that linear out of target_modules, or serve this mixture with "
                "transformers."
            )
        self.was_checked = True


def _check_base(base: nn.Module) -> None:
    """Raise ValueError for a base of which vLLM keeps more than keys and values."""
    name = type(base).__name__
    kinds = {
        "keeps states of its own, as state-space models do": has_inner_state(base),
        "mixes attention and states (hybrid)": is_hybrid(base),
        "has no attention": is_attention_free(base),
        "reads images or sound": supports_multimodal(base),
    }
    for kind, is_so in kinds.items():
        if is_so:
            raise ValueError(
                f"vLLM's {name} {kind}, and around a mixture it would not be told so: serve this "
                "mixture with transformers."
            )


__all__ = ["Checkpoint", "MoeLoraForCausalLM"]
