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

SAMPLED_TENSORS = 32
SAMPLED_VALUES = 8


def fingerprint(model: PreTrainedModel, excluded: Iterable[str]) -> dict[str, Any]:
    """Shapes by name, and a few values of a few tensors, of the base inside `model`, without the
    keys `excluded`.
    """
    tensors = _base_tensors(model, excluded)
    sample = _sample(tensors)
    dtypes = {name: str(tensors[name].dtype).removeprefix("torch.") for name in sample}
    return {"shapes": _shapes(tensors), "sample": sample, "dtypes": dtypes}


def digest(print_: Mapping[str, Any]) -> str:
    """A short hash of a fingerprint, for a folder's name."""
    return hashlib.sha256(json.dumps(print_, sort_keys=True).encode()).hexdigest()[:16]


def differences(
    saved: Mapping[str, Any], model: PreTrainedModel, excluded: Iterable[str]
) -> list[str]:
    """What differs between the base that was saved and the one in `model`, in words; empty where
    nothing does.
    """
    tensors = _base_tensors(model, excluded)
    shapes = _shapes(tensors)
    found = []
    for title, names in (
        ("weights it lacks", sorted(set(saved["shapes"]) - set(shapes))),
        ("weights it has in addition", sorted(set(shapes) - set(saved["shapes"]))),
    ):
        if names:
            found.append(
                f"{title}: {', '.join(names[:4])}{' …' if len(names) > 4 else ''} ({len(names)} in all)"
            )
    for name, shape in saved["shapes"].items():
        if name in shapes and None not in (shape, shapes[name]) and shapes[name] != shape:
            found.append(f"{name} is {shapes[name]}, was {shape}")
    return found[:8] or _value_differences(saved, tensors)


def _value_differences(saved: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> list[str]:
    """Sampled tensors whose values changed by more than loading in another floating dtype explains."""
    changed = []
    for name, values in saved["sample"].items():
        tensor = tensors[name]
        if not tensor.is_floating_point() or tensor.device.type == "meta":
            continue
        now, then = torch.tensor(_values(tensor)), torch.tensor(values)
        dtypes = (tensor.dtype, getattr(torch, saved["dtypes"][name]))
        # Through 16 bits, then or now, the same weights come out nearly the same.
        tolerance = (
            0.0 if all(dtype in (torch.float32, torch.float64) for dtype in dtypes) else 1e-2
        )
        if now.shape != then.shape or not torch.allclose(
            now, then, rtol=tolerance, atol=tolerance * 1e-2
        ):
            changed.append(f"{name} has other values (such as {now[0]:.6g}, was {then[0]:.6g})")
    return changed[:4]


def _base_tensors(model: PreTrainedModel, excluded: Iterable[str]) -> dict[str, Tensor]:
    skip = set(excluded)
    return {
        n: p for n, p in model.named_parameters() if not n.startswith("moelora.") and n not in skip
    }


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, list[int] | None]:
    """Shapes by name; None for what is quantised, whose storage may have any."""
    return {name: list(t.shape) if t.is_floating_point() else None for name, t in tensors.items()}


def _sample(tensors: Mapping[str, Tensor]) -> dict[str, list[float]]:
    names = [
        n
        for n, t in tensors.items()
        if t.is_floating_point() and t.device.type != "meta" and t.numel()
    ]
    step = max(1, len(names) // SAMPLED_TENSORS)
    return {name: _values(tensors[name]) for name in names[::step]}


def _values(tensor: Tensor) -> list[float]:
    """A few values spread over the tensor, exactly representable in JSON."""
    flat = tensor.detach().reshape(-1)
    where = torch.linspace(
        0, flat.numel() - 1, min(SAMPLED_VALUES, flat.numel()), dtype=torch.float64
    ).long()
    return [float(v) for v in flat[where.to(flat.device)].float().cpu()]
