"""The model classes: a mixin over the base's own class, made on the fly and set in place."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.utils.checkpoint
from torch import Tensor
from torch.nn.modules.module import _IncompatibleKeys
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES as CLASSIFIERS,
)

from .adapters.composing import FromAdapters
from .adapters.export import ExpertExport
from .checkpoint import load as restore
from .checkpoint import save as saving
from .config import MoeLoraConfig
from .core.forward import ROUTING_ONLY
from .core.generation import MoeLoraGeneration
from .core.gradient_checkpointing import RoutedCheckpoint
from .core.model import MixtureModel, base_class, become, rebuild, revert
from .core.overrides import ExpertForcing
from .core.report import RoutingReport
from .expert_pool.changes import ExpertPool
from .injection.sites import eject, inject, undone_on_error
from .injection.targets import has_peft_layers
from .routers.base import Routing
from .training import router_init


class MoeLoraModel(
    FromAdapters,
    ExpertExport,
    ExpertPool,
    ExpertForcing,
    MoeLoraGeneration,
    MixtureModel,
):
    """What every model with a mixture inside can do, whatever its base; see `MoeLoraForCausalLM`."""

    config_class = MoeLoraConfig

    @classmethod
    def from_base(
        cls, base: str | PreTrainedModel, config: MoeLoraConfig | None = None, **kwargs
    ) -> Any:
        """Put a new mixture into a base; before the first step its logits are the base's, bit for
        bit.

        base: a hub id, a folder, or a loaded model, which is changed in place (`unload()` gives it
        back).
        kwargs: for the base's `from_pretrained`: dtype, device_map, attn_implementation,
        quantization_config …

        Raises:
            ValueError, TypeError: a base of the wrong kind, keywords beside a loaded model, or no
            module to adapt.
        """
        config = MoeLoraConfig() if config is None else config
        if not isinstance(config, MoeLoraConfig):
            raise TypeError(f"config is a {type(config).__name__}; expected a MoeLoraConfig.")
        config = config.without_base()
        config.validate()
        return cls.put_into(cls._base_for(base, config, kwargs), config)

    @classmethod
    def _base_for(cls, base: Any, config: MoeLoraConfig, kwargs: dict[str, Any]) -> PreTrainedModel:
        """The base, loaded and fit to take a mixture; `config` notes where it came from."""
        if isinstance(base, PreTrainedModel):
            if kwargs:
                raise ValueError(
                    f"{sorted(kwargs)} go to from_pretrained, but the base is loaded already: drop them."
                )
            model = base
        elif isinstance(base, str) or hasattr(base, "__fspath__"):
            kwargs["revision"] = config.base_revision = restore.commit_of(base, kwargs)
            config.base_subfolder = kwargs.get("subfolder")
            model = cls.auto_class.from_pretrained(base, **kwargs)
        else:
            raise TypeError(
                f"base is a {type(base).__name__}; expected a hub id, a folder or a PreTrainedModel "
                "(of a PeftModel, pass model.merge_and_unload() or model.unload())."
            )
        cls._check_base(model)
        return model

    @classmethod
    def put_into(
        cls,
        model: PreTrainedModel,
        config: MoeLoraConfig,
        then: Callable[[Any], None] | None = None,
    ) -> Any:
        """Make `model` one with a mixture, in place, and do `then` with it; undo all of it if that
        fails.
        """
        with undone_on_error(model):
            inject(model, config, cls.is_classifier)
            made = become(model, cls)
            if then is not None:
                then(made)
        return made

    @classmethod
    def from_pretrained(
        cls, folder: str, *args, config: MoeLoraConfig | None = None, **kwargs
    ) -> Any:
        """Load a folder (or hub repository) written by `save_pretrained`: the base, then the
        experts.

        base: a folder, id or loaded model to use instead of the one that the checkpoint names.
        num_experts_per_tok and what else leaves the tensors' meaning alone: instead of what was
        saved.
        allow_base_mismatch: take a base whose weights are not the ones the experts were trained on.
        Other keywords go to the base's `from_pretrained`.

        Raises:
            ValueError: no such checkpoint, a damaged or newer one, or another base, with what
            differs.
        """
        return restore.load(cls, folder, config, **kwargs)

    @classmethod
    def _from_config(cls, config: Any, **kwargs) -> Any:
        if not issubclass(cls, PreTrainedModel):
            raise ValueError(
                f"A {type(config).__name__} alone makes no model: use {cls.__name__}.from_base."
            )
        return super()._from_config(config, **kwargs)  # type: ignore[misc]

    @classmethod
    def _check_base(cls, model: PreTrainedModel) -> None:
        if isinstance(model, MoeLoraModel):
            raise ValueError(
                "The base holds a mixture already; take it out with model.unload() first."
            )
        if has_peft_layers(model):
            raise ValueError(
                f"This {type(model).__name__} has PEFT adapters inside: merge or unload them first "
                "(PeftModel.merge_and_unload(), PeftModel.unload(); model.delete_adapter(name))."
            )
        classifier = type(model).__name__ in CLASSIFIERS.values() or type(model).__name__.endswith(
            "ForSequenceClassification"
        )
        if cls.is_classifier and not classifier:
            raise TypeError(
                f"{type(model).__name__} is no sequence classifier; use MoeLoraForCausalLM for it."
            )
        if not cls.is_classifier and (classifier or model.get_output_embeddings() is None):
            raise TypeError(
                f"{type(model).__name__} has no language modelling head; expected a causal language model "
                "(for a classifier use MoeLoraForSequenceClassification)."
            )

    def unload(self) -> PreTrainedModel:
        """Take the mixture out, in place, and return the base with its own class."""
        eject(self)  # type: ignore[arg-type]
        return revert(self)

    @torch.no_grad()
    def route(self, **inputs) -> RoutingReport:
        """Report which experts the routers choose for `inputs` (input_ids, attention_mask …), and
        how surely.

        With router_scope="model" the forward pass stops once its router has read: at router_layer=0
        nothing but the embeddings is computed.
        """
        return RoutingReport.of(self.moelora, self.routing_only(**inputs), inputs)

    def routing_only(self, **inputs) -> tuple[Routing, ...]:
        """The same forward pass as `route`, with gradients: one `Routing` a router, no router
        losses attached.
        """
        outputs = self(**inputs, output_expert_routing=ROUTING_ONLY)  # type: ignore[operator]
        return outputs.expert_routing

    def describe_experts(
        self, texts: Mapping[str, Any], tokenizer: Callable[..., Any] | None = None
    ) -> None:
        """See `moelora.training.router_init.describe_experts`."""
        router_init.describe_experts(self, texts, tokenizer)

    def save_pretrained(
        self,
        folder: str,
        is_main_process: bool = True,
        state_dict=None,
        save_base: bool = False,
        **kwargs,
    ):
        """Write the experts, routers and config (a few MB), and with `save_base` the base beside
        them.

        Atomic: until the last file is in place the folder holds the checkpoint that was there
        before.

        Raises:
            OSError: the folder cannot be written; the checkpoint that was there is left as it was.
            ValueError, TypeError: the folder is the base's own, or a keyword that does not exist.
        """
        if is_main_process:
            saving.save(self, folder, state_dict=state_dict, save_base=save_base, **kwargs)

    def load_state_dict(
        self, state_dict: Mapping[str, Tensor], strict: bool = True, assign: bool = False
    ):
        """Load tensors; missing keys of the base are forgiven, missing keys of the mixture never.

        Raises:
            RuntimeError: a key of the mixture is missing, too many, or of the wrong shape.
        """
        trained = set(saving.trained_keys(self))
        missing = sorted(trained - set(state_dict))
        surplus = sorted(k for k in state_dict if k.startswith(saving.PREFIX) and k not in trained)
        if missing or surplus:
            raise RuntimeError(
                f"The state dict does not fit this mixture: missing {missing[:5]} ({len(missing)} in all), "
                f"unknown {surplus[:5]} ({len(surplus)} in all)."
            )
        result = super().load_state_dict(state_dict, strict=False, assign=assign)  # type: ignore[misc]
        if strict and result.unexpected_keys:
            raise RuntimeError(
                f"The state dict has keys that the model lacks: {result.unexpected_keys[:5]}."
            )
        return _IncompatibleKeys([], result.unexpected_keys)

    def _set_gradient_checkpointing(
        self, enable: bool = True, gradient_checkpointing_func=None, **kwargs
    ):
        """As the base's; a recomputed layer sees the routing of its own forward pass."""
        if gradient_checkpointing_func is None:
            gradient_checkpointing_func = torch.utils.checkpoint.checkpoint
        routed = RoutedCheckpoint(self.moelora, gradient_checkpointing_func)
        super()._set_gradient_checkpointing(enable, routed, **kwargs)  # type: ignore[misc]

    def _get_name(self) -> str:
        # Trainer looks this up to decide whether label smoothing shifts the labels.
        return base_class(type(self)).__name__

    def __reduce_ex__(self, protocol):
        return rebuild, type(self).__bases__, self.__dict__


class MoeLoraForCausalLM(MoeLoraModel):
    """A causal language model with a mixture of LoRA experts inside; an instance is also one of its
    base's class.

    `forward` takes what the base's takes, and router_mask `[batch, length]` (the prompt, at
    sequence level), expert_routing (of an earlier step), expert_targets (`[batch]` or `[batch,
    length]`), output_expert_routing, expert_weights (`[E]`, `[batch, E]` or `[batch, length, E]`:
    the weight of every expert, in the routers' place; 0 for one that is not used) and
    banned_experts (names that the routers may not choose); generate() takes them too. With
    expert_targets and without labels `loss` is what the router losses come to, so that routers can
    train alone. output_expert_routing="only" gives the routing alone, and takes gradients (see
    `routing_only`). The output is the base's own, with `expert_aux_loss` (0-dim, what the router
    losses come to; not part of `loss`) and `expert_routing` (one `Routing` a router).
    """

    auto_class = AutoModelForCausalLM


class MoeLoraForSequenceClassification(MoeLoraModel):
    """A sequence classifier with a mixture of LoRA experts inside; its head trains too. See
    `MoeLoraForCausalLM`.
    """

    auto_class = AutoModelForSequenceClassification
    is_classifier = True
