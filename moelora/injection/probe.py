"""A forward pass of two tokens that shows what modules of a base read and give."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel

from ..core.blocks import read_by
from ..host_internals import FAKE_TENSOR_LOG, FakeTensorMode, is_partitioned
from .base import snapshot
from .modules import device_of
from .quantised import is_quantised

NOT_CALLED = "its forward is not called (the base reads its weight directly)"


class Call(NamedTuple):
    """A module has been called.

    Args:
        name: its full name.
        x: what it read, None where its first argument is no tensor.
        output: what it gave.
    """

    name: str
    x: Any
    output: Any


def probe(model: PreTrainedModel, names: Iterable[str]) -> list[Call]:
    """The calls of these modules in a forward pass of two tokens, in the order in which they ended;
    the base stays as it was.

    Under `FakeTensorMode`: nothing is computed, and real and meta weights work alike. An operator
    without a fake implementation (grouped MoE kernels in fp32) is met by a real forward, where the
    weights are real; so is a base that accelerate moves between devices, whose hooks know no fake
    weights, and a quantised one, whose linears may keep what a forward made of their weights.
    """
    if any(is_partitioned(parameter) for parameter in model.parameters()):
        # DeepSpeed has no whole weights here outside of its own engine: the same modules do.
        with torch.device("meta"):
            model = type(model)(model.config)
    modules = {name: model.get_submodule(name) for name in names}
    is_moved = any(hasattr(module, "_hf_hook") for module in model.modules())
    if not is_moved and not is_quantised(model):
        # It would print the traceback of an operator without a fake implementation.
        log = logging.getLogger(FAKE_TENSOR_LOG)
        was_disabled = log.disabled
        log.disabled = True
        try:
            with FakeTensorMode(allow_non_fake_inputs=True):
                return _forward_two_tokens(model, modules)
        except Exception:
            if model.device.type == "meta":
                raise
        finally:
            log.disabled = was_disabled
    return _forward_two_tokens(model, modules)


def first_inputs(calls: Sequence[Call]) -> dict[str, Any]:
    """What each module read when it was first called, by its name.

    Args:
        calls: of a probe.
    """
    return {call.name: call.x for call in reversed(calls)}


@torch.no_grad()
def _forward_two_tokens(model: PreTrainedModel, modules: dict[str, nn.Module]) -> list[Call]:
    ids = torch.zeros(1, 2, dtype=torch.long, device=device_of(model))
    keywords = {"use_cache": False, "decoder_input_ids": ids}
    taken = inspect.signature(model.forward).parameters
    calls: list[Call] = []
    restore = snapshot(model)
    try:
        for name, module in modules.items():
            module.register_forward_hook(partial(_record, calls, name), with_kwargs=True)
        model.eval()
        model(input_ids=ids, **{k: v for k, v in keywords.items() if k in taken})
    finally:
        restore()
    return calls


def _record(
    calls: list[Call], name: str, module: nn.Module, args: tuple, kwargs: dict, output: Any
) -> None:
    # Keeping the tensor keeps its id from being used again.
    calls.append(Call(name, read_by(args, kwargs), output))
