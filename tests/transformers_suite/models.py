"""Classes that transformers' tests can construct from a base's configuration: mixtures that act."""

from __future__ import annotations

import zlib
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from moelora import MoeLoraConfig, MoeLoraForCausalLM, MoeLoraForSequenceClassification


class CausalWithBase(MoeLoraForCausalLM):
    """Saves its base along: a base that a test made has no name to load it by."""

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        super().save_pretrained(*args, **{"save_base": True, **kwargs})


class ClassifierWithBase(MoeLoraForSequenceClassification):
    """As `CausalWithBase`, with a classification head."""

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        super().save_pretrained(*args, **{"save_base": True, **kwargs})


def mixture_class(base: type[PreTrainedModel], config: PreTrainedConfig, **fields: Any) -> type:
    """A class whose call and `from_pretrained` give mixtures in `base`.

    config: any small configuration of `base`. fields: of `MoeLoraConfig`.
    """
    classifier = base.__name__.endswith("ForSequenceClassification")
    public = ClassifierWithBase if classifier else CausalWithBase

    def put_into(model: PreTrainedModel) -> Any:
        return _fill(public.from_base(model, MoeLoraConfig(**fields)))

    # The class of such a mixture: all that tests ask of a class is inherited from it.
    made = type(put_into(base(config)))

    class Constructible(made):  # type: ignore[valid-type, misc]
        def __new__(cls, config: Any, *args: Any, **kwargs: Any) -> Any:
            return put_into(base(config, *args, **kwargs))

        @classmethod
        def _from_config(cls, config: Any, **kwargs: Any) -> Any:
            return put_into(base._from_config(config, **kwargs))

        @classmethod
        def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
            return public.from_pretrained(*args, **kwargs)

    # The tests choose inputs and labels by the name of the class.
    Constructible.__name__ = Constructible.__qualname__ = base.__name__
    return Constructible


@torch.no_grad()
def _fill(model: Any) -> Any:
    """Values for every B, which is zero in a new mixture, so that experts act."""
    for expert in range(model.moelora.num_experts):
        for name, factors in model.moelora.expert(expert).items():
            factors.B.copy_(_drawn(f"{name} {expert}", factors.B))
    return model


def _drawn(name: str, like: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    return 0.05 * torch.randn(like.shape, generator=generator)
