"""What a checkpoint says of a model: the tensors that were trained, and of its base a fingerprint,
shapes and a sample of values, by which it is known again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Container, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..core.experts import OTHER_EXPERTS, is_sharded
from ..core.mixture import Mixture
from ..core.model import MixtureModel, base_class
from ..injection.quantised import has_codes
from ..injection.sites import saved_modules
from .scales import scales_of

SAMPLED_TENSORS = 32
SAMPLED_VALUES = 8
EXACT = ("float32", "float64")
FLOATS = (*EXACT, "bfloat16", "float16")


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
            f"all), unknown {surplus[:5]} ({len(surplus)} in all). {OTHER_EXPERTS}"
        )
    for key, tensor in expected.items():
        if state[key].shape != tensor.shape:
            raise RuntimeError(
                f"{key} has shape {list(state[key].shape)}; expected {list(tensor.shape)}. "
                + (OTHER_EXPERTS if Mixture.owns(key) else "")
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
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    # float8 has no minimum. Both ends keep a NaN, and nothing of the tensor's size is made.
    ends = (tensor.float() if tensor.element_size() == 1 else tensor).aminmax()
    return bool(torch.stack(list(ends)).isfinite().all())


def fingerprint(
    model: PreTrainedModel,
    excluded: Iterable[str],
    gathered: Mapping[str, Tensor] | None = None,
    sampled: Container[str] | None = None,
) -> dict[str, Any]:
    """Shapes by name, and a few values of a few tensors, of the base inside `model`; of quantised
    ones, which have no shape here, a few scales.

    excluded: the keys that are not part of it, since they are trained.
    gathered: whole tensors by key, where the model's own are sharded or offloaded.
    sampled: of which tensors to take values, as far as they are there; None: evenly spread ones.
    """
    skip = set(excluded)
    base = [(n, p) for n, p in model.named_parameters() if not Mixture.owns(n) and n not in skip]
    tensors = {name: (gathered or {}).get(name, parameter) for name, parameter in base}
    sizes: dict[str, Any] = {name: list(tensor.shape) for name, tensor in tensors.items()}
    kinds = {name: str(tensor.dtype).removeprefix("torch.") for name, tensor in tensors.items()}
    for name, parameter in base:
        if has_codes(parameter):
            # Its storage may have any shape.
            sizes[name] = None
            linear = model.get_submodule(name.rpartition(".")[0])
            kinds[name], tensors[name] = scales_of(linear, parameter)
    names = [name for name, tensor in tensors.items() if _has_values(tensor)]
    spread = names[:: max(1, len(names) // SAMPLED_TENSORS)]
    names = spread if sampled is None else [name for name in names if name in sampled]
    return {
        "shapes": sizes,
        "sample": {name: sample_of(tensors[name]) for name in names},
        "dtypes": {name: kinds[name] for name in names},
    }


def digest(print_: Mapping[str, Any]) -> str:
    """A short hash of a fingerprint, for a folder's name."""
    return hashlib.sha256(json.dumps(print_, sort_keys=True).encode()).hexdigest()[:16]


def check_fingerprint(saved: Mapping[str, Any]) -> None:
    """Raise ValueError unless `saved`, read from a file, has the form that `fingerprint` gives."""
    parts = [saved.get(part) for part in ("shapes", "sample", "dtypes")]
    if not all(isinstance(part, dict) for part in parts):
        raise ValueError("the base's fingerprint lacks shapes, sample or dtypes")
    for name, values in saved["sample"].items():
        numbers = isinstance(values, list) and all(isinstance(v, float) for v in values)
        if not (numbers and values):
            raise ValueError(f"the base's fingerprint is not valid at {name[:80]!r}")


def differences(
    saved: Mapping[str, Any], model: PreTrainedModel, excluded: Iterable[str]
) -> list[str]:
    """What differs between the base with the fingerprint `saved` and the one in `model`, in words.

    excluded: the keys that are not part of the base, since they were trained.
    """
    found = fingerprint(model, excluded, sampled=saved["sample"])
    then = saved["shapes"]
    now = found["shapes"]
    differing = []
    for title, names in (
        ("weights it lacks", sorted(then.keys() - now.keys())),
        ("weights it has in addition", sorted(now.keys() - then.keys())),
    ):
        if names:
            differing.append(f"{title}: {', '.join(names[:4])} ({len(names)} in all)")
    for name, shape in now.items():
        before = then.get(name)
        if None not in (shape, before) and shape != before:
            differing.append(f"{name} is {shape}, was {before}")
    return differing[:8] or differing_values(saved, found)


def differing_values(saved: Mapping[str, Any], found: Mapping[str, Any]) -> list[str]:
    """In words, which sampled values of two fingerprints differ; of tensors that both have."""
    differing = []
    for name, values in found["sample"].items():
        now_kind, then_kind = (own["dtypes"].get(name) for own in (found, saved))
        if now_kind != then_kind and not (now_kind in FLOATS and then_kind in FLOATS):
            # One of them is quantised, or in another way: scales are no weights.
            continue
        new = torch.tensor(values)
        old = torch.tensor(saved["sample"][name])
        # Through 16 bits, then or now, the same weights come out nearly the same.
        same_bits = all(own["dtypes"].get(name) in EXACT for own in (found, saved))
        rtol, atol = (0.0, 0.0) if same_bits else (1e-2, 1e-4)
        if new.shape != old.shape or not torch.allclose(new, old, rtol=rtol, atol=atol):
            differing.append(f"{name} has other values (such as {new[0]:.6g}, was {old[0]:.6g})")
    return differing[:4]


def _has_values(tensor: Tensor) -> bool:
    """Whether this process has values of `tensor` to compare, as a whole."""
    there = tensor.is_floating_point() and tensor.numel() > 0
    return there and not tensor.is_meta and not is_sharded(tensor)


def sample_of(tensor: Tensor) -> list[float]:
    """A few values spread over the tensor, exactly representable in JSON."""
    flat = tensor.detach().reshape(-1)
    count = min(SAMPLED_VALUES, flat.numel())
    where = torch.linspace(0, flat.numel() - 1, count, dtype=torch.float64).long()
    return flat[where.to(flat.device)].float().tolist()
