"""The fingerprint of a base: its weights' shapes and a sample of their values, to recognise it on
loading.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..core.experts import is_sharded
from ..core.mixture import Mixture

SAMPLED_TENSORS = 32
SAMPLED_VALUES = 8
EXACT = (torch.float32, torch.float64)


def fingerprint(
    model: PreTrainedModel, excluded: Iterable[str], gathered: Mapping[str, Tensor] | None = None
) -> dict[str, Any]:
    """Shapes by name, and a few values of a few tensors, of the base inside `model`.

    excluded: the keys that are not part of it, since they are trained.
    gathered: whole tensors by key, where the model's own are sharded or offloaded.
    """
    tensors = _base_tensors(model, excluded)
    tensors |= {name: own for name, own in (gathered or {}).items() if name in tensors}
    names = [name for name, tensor in tensors.items() if _has_values(tensor)]
    names = names[:: max(1, len(names) // SAMPLED_TENSORS)]
    return {
        "shapes": {name: _shape(tensor) for name, tensor in tensors.items()},
        "sample": {name: _values(tensors[name]) for name in names},
        "dtypes": {name: str(tensors[name].dtype).removeprefix("torch.") for name in names},
    }


def digest(print_: Mapping[str, Any]) -> str:
    """A short hash of a fingerprint, for a folder's name."""
    return hashlib.sha256(json.dumps(print_, sort_keys=True).encode()).hexdigest()[:16]


def check_fingerprint(saved: Mapping[str, Any]) -> None:
    """Raise ValueError unless `saved`, read from a file, has the form that `fingerprint` gives."""
    shapes, sample, dtypes = (saved.get(part) for part in ("shapes", "sample", "dtypes"))
    if not (isinstance(shapes, dict) and isinstance(sample, dict) and isinstance(dtypes, dict)):
        raise ValueError("the base's fingerprint lacks shapes, sample or dtypes")
    for name, values in sample.items():
        numbers = isinstance(values, list) and all(isinstance(v, float) for v in values)
        dtype = getattr(torch, str(dtypes.get(name)), None)
        if name not in shapes or not (numbers and values) or not isinstance(dtype, torch.dtype):
            raise ValueError(f"the base's fingerprint is not valid at {name[:80]!r}")


def differences(
    saved: Mapping[str, Any], model: PreTrainedModel, excluded: Iterable[str]
) -> list[str]:
    """What differs between the base with the fingerprint `saved` and the one in `model`, in words.

    excluded: the keys that are not part of the base, since they were trained.
    """
    tensors = _base_tensors(model, excluded)
    shapes = saved["shapes"]
    differing = []
    for title, names in (
        ("weights it lacks", sorted(shapes.keys() - tensors.keys())),
        ("weights it has in addition", sorted(tensors.keys() - shapes.keys())),
    ):
        if names:
            differing.append(f"{title}: {', '.join(names[:4])} ({len(names)} in all)")
    for name, tensor in tensors.items():
        now = _shape(tensor)
        then = shapes.get(name)
        if None not in (now, then) and now != then:
            differing.append(f"{name} is {now}, was {then}")
    return differing[:8] or _value_differences(saved, tensors)


def _value_differences(saved: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> list[str]:
    """Sampled tensors that changed by more than loading in another floating dtype explains."""
    changed = []
    for name, values in saved["sample"].items():
        tensor = tensors[name]
        if not _has_values(tensor):
            continue
        now = torch.tensor(_values(tensor))
        then = torch.tensor(values)
        # Through 16 bits, then or now, the same weights come out nearly the same.
        same_bits = tensor.dtype in EXACT and getattr(torch, saved["dtypes"][name]) in EXACT
        rtol, atol = (0.0, 0.0) if same_bits else (1e-2, 1e-4)
        if now.shape != then.shape or not torch.allclose(now, then, rtol=rtol, atol=atol):
            changed.append(f"{name} has other values (such as {now[0]:.6g}, was {then[0]:.6g})")
    return changed[:4]


def _base_tensors(model: PreTrainedModel, excluded: Iterable[str]) -> dict[str, Tensor]:
    skip = set(excluded)
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if not Mixture.owns(name) and name not in skip
    }


def _shape(tensor: Tensor) -> list[int] | None:
    """None for what is quantised, whose storage may have any shape."""
    return list(tensor.shape) if tensor.is_floating_point() else None


def _has_values(tensor: Tensor) -> bool:
    """Whether this process has values of `tensor` to compare, as a whole."""
    there = tensor.is_floating_point() and tensor.numel() > 0
    return there and not tensor.is_meta and not is_sharded(tensor)


def _values(tensor: Tensor) -> list[float]:
    """A few values spread over the tensor, exactly representable in JSON."""
    flat = tensor.detach().reshape(-1)
    count = min(SAMPLED_VALUES, flat.numel())
    where = torch.linspace(0, flat.numel() - 1, count, dtype=torch.float64).long()
    return flat[where.to(flat.device)].float().tolist()
