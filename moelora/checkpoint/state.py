"""What of a model's state dict a checkpoint holds, and loading a state dict into a mixture."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..core.mixture import Mixture
from ..core.model import MixtureModel, base_class
from ..injection.targets import saved_modules


class LoadedKeys(NamedTuple):
    """What `load_state_dict` returns, under torch's names."""

    missing_keys: list[str]
    unexpected_keys: list[str]


def layout(model: MixtureModel) -> dict[str, Tensor]:
    """What a checkpoint of `model` holds: by key, a tensor on the meta device with its shape and
    dtype.

    That is the mixture, in the merged form, and the base's modules that train. A weight that
    several names share stands under the first of them.
    """
    trained = {
        id(parameter)
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and not Mixture.owns(name)
    }
    for _, module in saved_modules(model, model.moelora_config, model.is_classifier):
        # Also where the user froze it after training it.
        trained |= {id(parameter) for parameter in module.parameters()}
    held = {}
    for key, tensor in nn.Module.state_dict(model, keep_vars=True).items():
        if Mixture.owns(key) or id(tensor) in trained:
            trained.discard(id(tensor))
            held[key] = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
    return model.moelora.merged(held)


def tensors_to_save(
    model: MixtureModel, state_dict: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """The tensors of a checkpoint of `model`, on the CPU.

    Args:
        model: the model to save.
        state_dict: the model's state dict where somebody else gathered it (FSDP, accelerate), raw
            or merged; the base's keys may be missing.

    Raises:
        ValueError: the state dict lacks a tensor, or one has another shape, is on the meta device,
            or contains NaN or Inf.
    """
    state = nn.Module.state_dict(model) if state_dict is None else state_dict
    state = model.moelora.merged(state)
    tensors = {}
    wrong = []
    for key, expected in layout(model).items():
        tensor = state.get(key)
        if tensor is None:
            wrong.append(f"{key} is missing")
        elif tensor.shape != expected.shape:
            wrong.append(f"{key} is {list(tensor.shape)}, expected {list(expected.shape)}")
        elif tensor.device.type == "meta":
            wrong.append(f"{key} is offloaded (pass state_dict=accelerator.get_state_dict(model))")
        elif not is_finite(tensor):
            wrong.append(f"{key} contains NaN or Inf")
        else:
            tensors[key] = tensor.detach().cpu().contiguous()
    if wrong:
        raise ValueError(
            f"This model cannot be saved: {'; '.join(wrong[:6])} ({len(wrong)} in all). "
            "Nothing was written."
        )
    return tensors


def load_state_dict(
    model: MixtureModel, state_dict: Mapping[str, Tensor], strict: bool = True, assign: bool = False
) -> LoadedKeys:
    """Load tensors into `model`; missing keys of the base are forgiven, of the mixture never.

    Args:
        model: the model to load into; unchanged after an error about the mixture.
        state_dict: the model's own state dict, or the merged form of a checkpoint.
        strict: whether keys that the model lacks are an error.
        assign: as in `torch.nn.Module.load_state_dict`.

    Raises:
        RuntimeError: a key of the mixture is missing, unknown, or of the wrong shape.
    """
    state = model.moelora.merged(state_dict)
    expected = layout(model)
    missing = sorted(set(expected) - set(state))
    surplus = sorted(key for key in state if Mixture.owns(key) and key not in expected)
    if missing or surplus:
        raise RuntimeError(
            f"The state dict does not fit this mixture: missing {missing[:5]} ({len(missing)} in "
            f"all), unknown {surplus[:5]} ({len(surplus)} in all)."
        )
    for key, tensor in expected.items():
        if state[key].shape != tensor.shape:
            raise RuntimeError(
                f"{key} has shape {list(state[key].shape)}; expected {list(tensor.shape)}."
            )
    load = base_class(type(model)).load_state_dict
    result = load(model, state, strict=False, assign=assign)
    model.moelora.has_values = True
    if strict and result.unexpected_keys:
        raise RuntimeError(
            f"The state dict has keys that the model lacks: {result.unexpected_keys[:5]}."
        )
    return LoadedKeys([], result.unexpected_keys)


def is_finite(tensor: Tensor) -> bool:
    """Whether `tensor` has no NaN and no Inf."""
    if not tensor.is_floating_point():
        return True
    # float8 has no isfinite.
    tensor = tensor.float() if tensor.element_size() == 1 else tensor
    return bool(tensor.isfinite().all())
