"""The model classes: a mixin over the base's own class, made on the fly and set in place."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
import torch.utils.checkpoint
from torch import Tensor
from torch.nn.modules.module import _IncompatibleKeys
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES as CLASSIFIERS,
)

from . import checkpoint
from .checkpointing import RoutedCheckpoint
from .config import MoeLoraConfig
from .forward import OWN_INPUTS, OWN_OUTPUTS, run_forward
from .generation import MoeLoraGeneration
from .mixture import Mixture
from .observe import RoutingReport
from .routers import Routing
from .sites import eject, inject


class MoeLoraModel(MoeLoraGeneration):
    """What every model with a mixture inside can do, whatever its base; see `MoeLoraForCausalLM`."""

    auto_class: ClassVar[type]
    is_classifier: ClassVar[bool] = False
    config_class = MoeLoraConfig
    moelora: Mixture

    @classmethod
    def from_base(cls, base: str | PreTrainedModel, config: MoeLoraConfig | None = None, **kwargs) -> Any:
        """Put a new mixture into a base; before the first step its logits are the base's, bit for bit.

        base: a hub id, a folder, or a loaded model, which is changed in place (`unload()` gives it back).
        kwargs: for the base's `from_pretrained`: dtype, device_map, attn_implementation, quantization_config …

        Raises:
            ValueError, TypeError: a base of the wrong kind, keywords beside a loaded model, or no module to adapt.
        """
        config = MoeLoraConfig() if config is None else config
        if not isinstance(config, MoeLoraConfig):
            raise TypeError(f"config is a {type(config).__name__}; expected a MoeLoraConfig.")
        config.validate()
        if isinstance(base, PreTrainedModel):
            if kwargs:
                raise ValueError(
                    f"{sorted(kwargs)} go to from_pretrained, but the base is loaded already: drop them."
                )
            model = base
        elif isinstance(base, str) or hasattr(base, "__fspath__"):
            model = cls.auto_class.from_pretrained(base, **kwargs)
        else:
            raise TypeError(
                f"base is a {type(base).__name__}; expected a hub id, a folder or a PreTrainedModel "
                "(of a PeftModel, pass model.merge_and_unload() or model.unload())."
            )
        cls._check_base(model)
        inject(model, config, cls.is_classifier)
        return become(model, cls)

    @classmethod
    def from_pretrained(cls, folder: str, *args, config: MoeLoraConfig | None = None, **kwargs) -> Any:
        """Load a folder (or hub repository) written by `save_pretrained`: the base, then the experts.

        base: a folder, id or loaded model to use instead of the one that the checkpoint names.
        allow_base_mismatch: take a base whose weights are not the ones the experts were trained on.
        Other keywords go to the base's `from_pretrained`.

        Raises:
            ValueError: no such checkpoint, a damaged or newer one, or another base, with what differs.
        """
        return checkpoint.load(cls, folder, config, **kwargs)

    @classmethod
    def _check_base(cls, model: PreTrainedModel) -> None:
        if isinstance(model, MoeLoraModel):
            raise ValueError("The base holds a mixture already; take it out with model.unload() first.")
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

    @property
    def moelora_config(self) -> MoeLoraConfig:
        """The mixture's configuration; `config` stays the base's."""
        return self.moelora.config

    def unload(self) -> PreTrainedModel:
        """Take the mixture out, in place, and return the base with its own class."""
        eject(self)  # type: ignore[arg-type]
        self.config.__dict__.pop("keys_to_ignore_at_inference", None)
        self.__dict__.pop("_hf_peft_config_loaded", None)
        self.__class__ = base_class(type(self))
        return self  # type: ignore[return-value]

    def freeze_experts(self, names: Iterable[str] | str) -> None:
        """Freeze these experts: no gradient, no optimizer state, no weight decay. Call before making the optimizer."""
        self._set_frozen(self._frozen() | self._indices(names))

    def unfreeze_experts(self, names: Iterable[str] | str) -> None:
        """Train these experts again. Call before making the optimizer."""
        self._set_frozen(self._frozen() - self._indices(names))

    @contextmanager
    def use_experts(self, experts: str | Iterable[str] | Mapping[str, float]) -> Iterator[Any]:
        """While inside, every token uses these experts: a name, names (weight 1 each), or names with weights."""
        weights = {experts: 1.0} if isinstance(experts, str) else experts
        if not isinstance(weights, Mapping):
            weights = dict.fromkeys(weights, 1.0)
        ids = [self.moelora_config.expert_index(name) for name in weights]
        device = self.device  # type: ignore[attr-defined]
        before = self.moelora.forced
        self.moelora.forced = Routing(
            torch.zeros(1, self.moelora_config.num_experts, device=device),
            torch.tensor([ids], dtype=torch.int64, device=device),
            torch.tensor([list(weights.values())], dtype=torch.float32, device=device),
        )
        try:
            yield self
        finally:
            self.moelora.forced = before

    @torch.no_grad()
    def route(self, **inputs) -> RoutingReport:
        """Run the model on `inputs` (input_ids, attention_mask …) and report which experts its routers chose."""
        outputs = self(**inputs, output_expert_routing=True)  # type: ignore[operator]
        return RoutingReport.of(self.moelora, outputs.expert_routing, inputs)

    def save_pretrained(
        self, folder: str, is_main_process: bool = True, state_dict=None, save_base: bool = False, **kwargs
    ):
        """Write the experts, routers and config (a few MB), and with `save_base` the base beside them.

        Atomic: until the last file is in place the folder holds the checkpoint that was there before.

        Raises:
            OSError: the folder cannot be written; what was there is left as it was.
        """
        if is_main_process:
            checkpoint.save(self, folder, state_dict=state_dict, save_base=save_base, **kwargs)

    def load_state_dict(self, state_dict: Mapping[str, Tensor], strict: bool = True, assign: bool = False):
        """Load tensors; missing keys of the base are forgiven, missing keys of the mixture never.

        Raises:
            RuntimeError: a key of the mixture is missing, too many, or of the wrong shape.
        """
        trained = set(checkpoint.trained_keys(self))
        missing = sorted(trained - set(state_dict))
        surplus = sorted(k for k in state_dict if k.startswith(checkpoint.PREFIX) and k not in trained)
        if missing or surplus:
            raise RuntimeError(
                f"The state dict does not fit this mixture: missing {missing[:5]} ({len(missing)} in all), "
                f"unknown {surplus[:5]} ({len(surplus)} in all)."
            )
        result = super().load_state_dict(state_dict, strict=False, assign=assign)  # type: ignore[misc]
        if strict and result.unexpected_keys:
            raise RuntimeError(f"The state dict has keys that the model lacks: {result.unexpected_keys[:5]}.")
        return _IncompatibleKeys([], result.unexpected_keys)

    def _set_gradient_checkpointing(self, enable: bool = True, gradient_checkpointing_func=None, **kwargs):
        """As the base's; a recomputed layer sees the routing of its own forward pass."""
        if gradient_checkpointing_func is None:
            gradient_checkpointing_func = torch.utils.checkpoint.checkpoint
        routed = RoutedCheckpoint(self.moelora, gradient_checkpointing_func)
        super()._set_gradient_checkpointing(enable, routed, **kwargs)  # type: ignore[misc]

    def _indices(self, names: Iterable[str] | str) -> frozenset[int]:
        names = [names] if isinstance(names, str) else names
        return frozenset(self.moelora_config.expert_index(name) for name in names)

    def _frozen(self) -> frozenset[int]:
        return next(iter(self.moelora.sites.values())).lora_A.frozen_experts  # type: ignore[union-attr,return-value]

    def _set_frozen(self, experts: frozenset[int]) -> None:
        for factor in self.moelora.factors():
            factor.set_frozen(experts)

    def _get_name(self) -> str:
        # Trainer looks this up to decide whether label smoothing shifts the labels.
        return base_class(type(self)).__name__

    def __reduce_ex__(self, protocol):
        return _rebuild, (base_class(type(self)), _public_class(type(self))), self.__dict__


class MoeLoraForCausalLM(MoeLoraModel):
    """A causal language model with a mixture of LoRA experts inside; an instance is also one of its base's class.

    `forward` takes what the base's takes, and router_mask `[batch, length]` (the prompt, at sequence level),
    expert_routing (of an earlier step), expert_targets (`[batch]` or `[batch, length]`), output_expert_routing.
    The output is the base's own, with `expert_aux_loss` (0-dim, what the router losses come to; not part of
    `loss`) and `expert_routing` (one `Routing` a router).
    """

    auto_class = AutoModelForCausalLM


class MoeLoraForSequenceClassification(MoeLoraModel):
    """A sequence classifier with a mixture of LoRA experts inside; its head trains too. See `MoeLoraForCausalLM`."""

    auto_class = AutoModelForSequenceClassification
    is_classifier = True


@functools.cache
def class_for(public: type[MoeLoraModel], base: type[PreTrainedModel]) -> type:
    """The class of models of class `base` with a mixture inside."""
    signature = inspect.signature(base.forward)
    parameters = list(signature.parameters.values())
    ours = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None) for name in OWN_INPUTS]
    keywords = [p for p in parameters if p.kind is p.VAR_KEYWORD]

    def forward(self, *args, **kwargs):
        return run_forward(self, base.forward, args, kwargs)

    forward.__doc__ = base.forward.__doc__
    forward.__signature__ = signature.replace(  # type: ignore[attr-defined]
        parameters=[p for p in parameters if p.kind is not p.VAR_KEYWORD] + ours + keywords
    )
    namespace = {
        "forward": forward,
        "config_class": base.config_class,
        "__module__": __name__,
        "__doc__": public.__doc__,
    }
    return type(f"MoeLora{base.__name__}", (public, base), namespace)


def become(model: PreTrainedModel, public: type[MoeLoraModel]) -> Any:
    """Give `model`, which holds a mixture, the class that uses it."""
    model.__class__ = class_for(public, type(model))
    known = getattr(model.config, "keys_to_ignore_at_inference", ["past_key_values"])
    model.config.keys_to_ignore_at_inference = list(dict.fromkeys([*known, *OWN_OUTPUTS]))
    if getattr(model, "is_quantized", False):
        # What Trainer looks for before it trains on a quantised base: that adapters are attached.
        model._hf_peft_config_loaded = True
    return model


def base_class(cls: type) -> type[PreTrainedModel]:
    """The base's class of a class made by `class_for`."""
    return cls.__bases__[1]


def _public_class(cls: type) -> type[MoeLoraModel]:
    return cls.__bases__[0]


def _rebuild(base: type[PreTrainedModel], public: type[MoeLoraModel]) -> Any:
    cls = class_for(public, base)
    return cls.__new__(cls)
