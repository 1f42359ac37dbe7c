"""The class of a model with a mixture inside, made on the fly as a subclass of its base's."""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any, ClassVar

from torch import nn
from torch.utils.checkpoint import checkpoint

from ..config import MoeLoraConfig
from ..host_internals import PEFT_ATTACHED, dispatched_forward, set_dispatched_forward
from ..routers import Routing
from .clients import call_of_client, unwatch_backbones, watch_backbones
from .expert_init import begin_experts
from .forward import OWN_OUTPUTS, make_output_classes, run_forward
from .generation import Generating, step_signature
from .gradient_checkpointing import RoutedCheckpoint
from .inputs import OWN_INPUTS
from .mixture import Mixture

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# What the class of a model is made of, and what an instance of it is pickled by.
MADE_OF = "_moelora_made_of"
# The base's name, while the model's is that of the mixture.
BASE_NAME = "_moelora_base_name"


class MixtureModel(PreTrainedModel if TYPE_CHECKING else object):
    """What every model with a mixture inside is: what the host libraries ask of its base, answered.

    The public methods are in `moelora.modeling`.
    """

    auto_class: ClassVar[Any]
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

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As torch's; a forward that a client has put in the place of ours is watched."""
        if "forward" not in self.__dict__:
            return super().__call__(*args, **kwargs)
        return call_of_client(self, super().__call__, args, kwargs)

    def _set_gradient_checkpointing(
        self, enable: bool = True, gradient_checkpointing_func: Any = None, **kwargs
    ) -> None:
        """As the base's; a layer that is computed again sees the pass that it belongs to."""
        function = gradient_checkpointing_func or checkpoint
        routed = RoutedCheckpoint(self.moelora, function)
        super()._set_gradient_checkpointing(enable, routed, **kwargs)

    @classmethod
    def _from_config(cls, config: Any, **kwargs) -> Any:
        if not hasattr(cls, MADE_OF):
            raise ValueError(
                f"A {type(config).__name__} alone makes no model: use {cls.__name__}.from_base."
            )
        return super()._from_config(config, **kwargs)  # type: ignore[misc]

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = None) -> None:
        """Nothing: a checkpoint names this package's classes, and is given no copy of their code.

        Args:
            auto_class: that loaded one under trust_remote_code=True.
        """

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        # transformers reads the source of the class's module, and this one has no attention.
        return base_class(cls)._can_set_attn_implementation()

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        return base_class(cls)._can_set_experts_implementation()

    def _get_name(self) -> str:
        # Trainer looks this up to decide whether label smoothing shifts the labels.
        return base_class(type(self)).__name__

    def __reduce_ex__(self, protocol):
        return rebuild, getattr(type(self), MADE_OF), self.__dict__

    def init_weights(self) -> None:
        """As the base's; and values for a mixture that was made on the meta device."""
        super().init_weights()
        if not self.moelora.has_values and self.device.type != "meta":
            self.moelora.redraw()
            begin_experts(self)


@functools.cache
def class_for(public: type, base: type[PreTrainedModel]) -> type:
    """The class of models of class `base` with a mixture inside.

    Args:
        public: the class of ours that it is an instance of.
        base: the base's own class.
    """
    make_output_classes(base.forward)
    signature = inspect.signature(base.forward)
    ours = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None) for name in OWN_INPUTS
    ]
    # Before the base's **kwargs, if it has any.
    parameters = sorted([*signature.parameters.values(), *ours], key=lambda own: own.kind)

    def forward(self, *args, **kwargs):
        if "labels" in signature.parameters:
            # Always there: after a graph break torch.compile does not notice a key that is new.
            kwargs.setdefault("labels", None)
        return run_forward(self, base.forward, args, kwargs)

    forward.__doc__ = f"{base.forward.__doc__ or ''}\n{OWN_INPUTS_DOC}"
    forward.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    namespace = {
        "forward": forward,
        "config_class": base.config_class,
        "__module__": __name__,
        "__doc__": public.__doc__,
        MADE_OF: (public, base),
    }
    bases = (public, base)
    if hasattr(base, "prepare_inputs_for_generation"):
        namespace["prepare_inputs_for_generation"] = step_signature(base)
        bases = (public, Generating, base)
    return type(f"MoeLora{base.__name__}", bases, namespace)


OWN_INPUTS_DOC = """
With a mixture of LoRA experts inside, forward (and generate) also take:
    router_mask (`Tensor` [batch, length], bool): the prompt's tokens, for a router that reads them.
    expert_routing (`tuple[Routing, ...]`): the routing of an earlier forward, to use again.
    expert_targets (`Tensor` [batch] or [batch, length], int): the expert that each sequence or
        token should choose, −100 for none; without labels the routers train alone.
    output_expert_routing (`bool` or `"only"`): put each router's `Routing` into the output; "only"
        stops once all routers have routed, and the routing takes gradients.
    expert_weights (`Tensor` [E], [batch, E] or [batch, length, E]): the weight of every expert, in
        the routers' place; 0 for one that is not used.
    banned_experts (`list[str]`): names of experts that the routers may not choose.
    router_context (`Tensor` [batch, n]): what router="context" reads, a vector for each sequence.
The output gains expert_aux_loss (0-dim: what the router losses come to; not part of loss) and
expert_routing (one `Routing` a router).
"""


def become(model: PreTrainedModel, public: type) -> Any:
    """Give `model`, which holds a mixture, the class that uses it."""
    model.__class__ = class_for(public, type(model))
    known = getattr(model.config, "keys_to_ignore_at_inference", ["past_key_values"])
    model.config.keys_to_ignore_at_inference = list(dict.fromkeys([*known, *OWN_OUTPUTS]))
    if getattr(model, "is_quantized", False):
        # What Trainer looks for before it trains on a quantised base: that adapters are attached.
        setattr(model, PEFT_ATTACHED, True)
    model.__dict__[BASE_NAME] = model.config.name_or_path
    # Clients load it again by its name, for a reference, or note it as what was adapted (PEFT): the
    # bare base would be silently wrong.
    rename(model, "")
    watch_backbones(model)
    _reroute(model)
    return model


def rename(model: PreTrainedModel, name: str) -> None:
    """Give `model` the name that clients load it by; "" where it can be loaded from nowhere."""
    model.config.name_or_path = name
    model.name_or_path = name


def revert(model: MixtureModel) -> PreTrainedModel:
    """Give `model`, which holds no mixture any more, its base's class."""
    model.__class__ = base_class(type(model))  # type: ignore[assignment]
    model.config.__dict__.pop("keys_to_ignore_at_inference", None)
    model.__dict__.pop(PEFT_ATTACHED, None)
    rename(model, model.__dict__.pop(BASE_NAME))
    unwatch_backbones(model)
    if dispatched_forward(model) is None:
        # A client's, which calls ours.
        model.__dict__.pop("forward", None)
    _reroute(model)
    return model


def base_class(cls: type) -> type[PreTrainedModel]:
    """The base's class of a class made by `class_for`, or of what an engine made of that."""
    return getattr(cls, MADE_OF)[1]


def public_class(cls: type) -> type:
    """The class of `moelora.modeling` of a class made by `class_for`."""
    return getattr(cls, MADE_OF)[0]


def rebuild(public: type, base: type[PreTrainedModel]) -> Any:
    """An empty model of the class for `base`: what unpickling and copying begin with."""
    cls = class_for(public, base)
    return object.__new__(cls)


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


def _reroute(model: PreTrainedModel) -> None:
    """Let a model that accelerate dispatched call its new class's forward."""
    if dispatched_forward(model) is not None:
        forward = types.MethodType(type(model).forward, model)
        set_dispatched_forward(model, forward)
        functools.update_wrapper(model.forward, forward)  # type: ignore[arg-type]
