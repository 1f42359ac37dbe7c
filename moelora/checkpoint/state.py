"""What of a model's state dict a checkpoint holds, and loading a state dict into a mixture."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..core.mixture import Mixture
from ..core.model import MixtureModel, base_class
from ..injection.targets import saved_modules


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
    for module in saved_modules(model, model.moelora_config, model.is_classifier):
        # Also where the user froze it after training it.
        trained |= {id(parameter) for parameter in module.parameters()}
    held = {}
    for key, tensor in nn.Module.state_dict(model, keep_vars=True).items():
        if Mixture.owns(key) or id(tensor) in trained:
            trained.discard(id(tensor))
            held[key] = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
    return model.moelora.merged(held)


def misfits(expected: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> list[str]:
    """In words, in what `tensors` are not those of a layout, each of its shape and kind."""
    wrong = [f"{key} is missing" for key in expected if key not in tensors]
    for key, tensor in tensors.items():
        own = expected.get(key)
        if own is None:
            wrong.append(f"{key} is unknown")
        elif tensor.shape != own.shape:
            wrong.append(f"{key} is {list(tensor.shape)}, expected {list(own.shape)}")
        elif tensor.dtype != own.dtype and not (
            tensor.is_floating_point() and own.is_floating_point()
        ):
            wrong.append(f"{key} has {tensor.dtype}, expected {own.dtype}")
    return wrong


def tensors_to_save(
    model: MixtureModel, state_dict: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """The tensors of a checkpoint of `model`, on the CPU.

    state_dict: the model's state dict where somebody else gathered it (FSDP, accelerate), raw or
    merged; the base's keys may be missing.

    Raises:
        ValueError: the state dict lacks a tensor, or one has another shape, is on the meta device,
            or contains NaN or Inf.
    """
    state = model.moelora.merged(nn.Module.state_dict(model) if state_dict is None else state_dict)
    expected = layout(model)
    own = {key: state[key] for key in expected if key in state}
    wrong = misfits(expected, own)
    for key, tensor in own.items():
        if tensor.is_meta:
            wrong.append(f"{key} is offloaded (pass state_dict=accelerator.get_state_dict(model))")
        elif not is_finite(tensor):
            wrong.append(f"{key} contains NaN or Inf")
    if wrong:
        raise ValueError(
            f"This model cannot be saved: {'; '.join(wrong[:6])} ({len(wrong)} in all). "
            "Nothing was written."
        )
    return {key: tensor.detach().cpu().contiguous() for key, tensor in own.items()}


def load_state_dict(
    model: MixtureModel, state_dict: Mapping[str, Tensor], strict: bool = True, assign: bool = False
) -> Any:
    """Load tensors into `model`, which is unchanged after an error about the mixture; returns what
    torch's does. Missing keys of the base are forgiven, of the mixture never.
    """
    state = model.moelora.merged(state_dict)
    expected = layout(model)
    missing = sorted(expected.keys() - state.keys())
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
    return result._replace(missing_keys=[])


def is_finite(tensor: Tensor) -> bool:
    """Whether `tensor` has no NaN and no Inf."""
    # float8 has no isfinite.
    small = tensor.is_floating_point() and tensor.element_size() == 1
    return bool((tensor.float() if small else tensor).isfinite().all())
