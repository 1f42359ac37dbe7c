"""Making the class of a base with a mixture inside, and changing a model's class in place."""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any, ClassVar

from torch import nn
from transformers import PreTrainedModel

from ..config import MoeLoraConfig
from ..routers.base import Routing
from .forward import OWN_INPUTS, OWN_OUTPUTS, run_forward
from .mixture import Mixture


class MixtureModel(PreTrainedModel if TYPE_CHECKING else object):
    """What every model with a mixture inside is, whatever its base; the public methods are in
    `modeling`.
    """

    auto_class: ClassVar[type]
    is_classifier: ClassVar[bool] = False
    moelora: Mixture

    @property
    def moelora_config(self) -> MoeLoraConfig:
        """The mixture's configuration; `config` stays the base's."""
        return self.moelora.config

    if TYPE_CHECKING:
        # What `moelora.modeling` adds and the rooms call.
        def use_experts(
            self, experts: Any = None, *, ban: Any = None
        ) -> AbstractContextManager[Any]: ...
        def routing_only(self, **inputs: Any) -> tuple[Routing, ...]: ...
        def add_expert(self, name: str, **options: Any) -> Any: ...
        def remove_expert(self, name: str) -> Any: ...


@functools.cache
def class_for(public: type, base: type[PreTrainedModel]) -> type:
    """The class of models of class `base` with a mixture inside."""
    signature = inspect.signature(base.forward)
    parameters = list(signature.parameters.values())
    ours = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None) for name in OWN_INPUTS
    ]
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
    if hasattr(base, "prepare_inputs_for_generation"):

        def prepare(self, *args, **kwargs):
            return public.prepare_inputs_for_generation(self, *args, **kwargs)

        # generate() looks here whether it may be given inputs_embeds.
        prepare.__signature__ = inspect.signature(base.prepare_inputs_for_generation)  # type: ignore[attr-defined]
        namespace["prepare_inputs_for_generation"] = prepare
    return type(f"MoeLora{base.__name__}", (public, base), namespace)


def become(model: PreTrainedModel, public: type) -> Any:
    """Give `model`, which holds a mixture, the class that uses it."""
    model.__class__ = class_for(public, type(model))
    known = getattr(model.config, "keys_to_ignore_at_inference", ["past_key_values"])
    model.config.keys_to_ignore_at_inference = list(dict.fromkeys([*known, *OWN_OUTPUTS]))
    if getattr(model, "is_quantized", False):
        # What Trainer looks for before it trains on a quantised base: that adapters are attached.
        model._hf_peft_config_loaded = True
    _reroute(model)
    return model


def revert(model: Any) -> PreTrainedModel:
    """Give `model`, which holds no mixture any more, its base's class."""
    model.__class__ = base_class(type(model))
    model.config.__dict__.pop("keys_to_ignore_at_inference", None)
    model.__dict__.pop("_hf_peft_config_loaded", None)
    _reroute(model)
    return model


@contextmanager
def keeping_modes(model: nn.Module) -> Iterator[None]:
    """Whatever happens inside, afterwards each submodule is in the mode it was in before."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Inside, all of `model` is in eval mode; afterwards each submodule is in its former mode."""
    with keeping_modes(model):
        model.eval()
        yield


def base_class(cls: type) -> type[PreTrainedModel]:
    """The base's class of a class made by `class_for`."""
    return cls.__bases__[1]


def rebuild(public: type, base: type[PreTrainedModel]) -> Any:
    """An empty model of the class for `base`: what unpickling and copying begin with."""
    cls = class_for(public, base)
    return object.__new__(cls)


def _reroute(model: PreTrainedModel) -> None:
    """Let a model that accelerate dispatched call its new class's forward: it keeps the old one on
    the instance.
    """
    if "_old_forward" in model.__dict__:
        forward = types.MethodType(type(model).forward, model)
        model.__dict__["_old_forward"] = forward
        functools.update_wrapper(model.forward, forward)  # type: ignore[arg-type]
