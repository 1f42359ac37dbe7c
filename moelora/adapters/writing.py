"""Writing a PEFT LoRA folder: its configuration and its tensors, both in place at once."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from os import PathLike
from pathlib import Path
from statistics import mode

import torch
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.constants import SEQ_CLS_HEAD_NAMES
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..checkpoint.atomic import atomic_folder
from ..core.experts import LoraFactors
from ..core.mixture import Mixture
from ..core.model import MixtureModel, base_class
from ..injection.sites import modules_to_save
from .folders import CONFIG, WEIGHTS

KEY = "base_model.model."
# What a folder may hold that `overwrite` replaces: an adapter as PEFT or this package writes it,
# and no more.
REPLACEABLE = {CONFIG, WEIGHTS, "README.md", ".gitattributes"}


def write_adapter(
    model: MixtureModel,
    deltas: Mapping[str, LoraFactors],
    folder: str | PathLike[str],
    *,
    dtype: torch.dtype | None,
    overwrite: bool,
) -> None:
    """Write `deltas`, by the linear's full name, and the trained head of `model` as a PEFT LoRA,
    cast to `dtype` if there is one.
    """
    check_folder(folder, overwrite)
    if not deltas:
        raise ValueError("There is nothing to export: rank 0 in every linear.")
    config, ranks = _config(model, deltas)
    tensors = _saved_tensors(model, config)
    for linear, factors in deltas.items():
        # Rows of zeros up to the rank that is written.
        more = (0, 0, 0, ranks[linear] - len(factors.A))
        A = nn.functional.pad(factors.A, more)
        B = nn.functional.pad(factors.B, more).T
        for part, tensor in (("lora_A", A), ("lora_B", B)):
            tensor = tensor.detach().to("cpu", dtype or tensor.dtype).contiguous()
            if not bool(tensor.isfinite().all()):
                raise ValueError(
                    f"{part} of {linear} contains NaN or Inf in {tensor.dtype}: nothing was "
                    "written. Check the expert, or export with a dtype of larger range."
                )
            tensors[f"{KEY}{linear}.{part}.weight"] = tensor
    # What PEFT's Auto classes need where there is no task that says the base's class.
    base = base_class(type(model))
    classes = {"base_model_class": base.__name__, "parent_library": base.__module__}
    with atomic_folder(folder, replace=True, what="adapter") as staging:
        config.save_pretrained(
            str(staging), auto_mapping_dict=None if config.task_type else classes
        )
        save_file(tensors, staging / WEIGHTS, metadata={"format": "pt"})
        # Again, since another process may have written it meanwhile.
        check_folder(folder, overwrite)


def check_folder(folder: str | PathLike[str], overwrite: bool) -> None:
    """Raise FileExistsError where `folder` may not be written to."""
    path = Path(folder)
    if path.exists() and not path.is_dir():
        raise FileExistsError(f"{path} is a file: give the adapter a folder of its own.")
    names = sorted(p.name for p in path.iterdir()) if path.is_dir() else []
    if names and not overwrite:
        raise FileExistsError(
            f"{path} is not empty ({', '.join(names[:4])}): pass overwrite=True, or another folder."
        )
    foreign = [name for name in names if name not in REPLACEABLE]
    if foreign:
        raise FileExistsError(
            f"{path} holds more than an adapter ({', '.join(foreign[:4])}), which overwrite=True "
            "would delete: choose another folder."
        )


def _config(
    model: MixtureModel, deltas: Mapping[str, LoraFactors]
) -> tuple[LoraConfig, dict[str, int]]:
    """PEFT's configuration, and the rank to write for each linear, higher than its own where s
    needs it.

    PEFT computes s as alpha / r (or / √r). Where no alpha gives exactly this s, r becomes the next
    power of two, by which a division is exact, and the rows in addition are 0: s and every product
    stay the same.
    """
    ours = model.moelora_config
    usual = ours._per_expert("lora_alpha")
    stable = ours.use_rslora and all(_alpha(f, usual, True) is not None for f in deltas.values())
    ranks = {}
    alphas = {}
    for linear, factors in deltas.items():
        ranks[linear] = len(factors.A)
        alphas[linear] = _alpha(factors, usual, stable)
        if alphas[linear] is None:
            ranks[linear] = 2 ** math.ceil(math.log2(len(factors.A)))
            alphas[linear] = factors.scaling * ranks[linear]
    rank, alpha = (mode(values.values()) for values in (ranks, alphas))
    saved, task = _saved_and_task(model, deltas)
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        # Keys that PEFT's `get_pattern_key` matches with this linear alone.
        rank_pattern={"^" + re.escape(n): r for n, r in ranks.items() if r != rank},
        alpha_pattern={"^" + re.escape(n): a for n, a in alphas.items() if a != alpha},
        use_rslora=stable,
        lora_dropout=ours.lora_dropout,
        fan_in_fan_out=any(isinstance(model.get_submodule(name), Conv1D) for name in deltas),
        modules_to_save=saved or None,
        task_type=task,
        inference_mode=True,
        base_model_name_or_path=ours.base_model_name_or_path,
        revision=ours.base_revision,
    )
    ends = [name.rpartition(".")[2] for name in deltas]
    config.target_modules = exact_targets(model, deltas, config, list(dict.fromkeys(ends)))
    return config, ranks


def _alpha(factors: LoraFactors, usual: Sequence[float], stable: bool) -> float | None:
    """An alpha from which PEFT computes exactly this scaling, a whole number where one does."""
    norm = math.sqrt(len(factors.A)) if stable else len(factors.A)
    alpha = factors.scaling * norm
    above, below = (math.nextafter(alpha, end) for end in (math.inf, -math.inf))
    near = [*usual, round(alpha), alpha, below, above]
    return next((a for a in near if a / norm == factors.scaling), None)


def _saved_and_task(
    model: MixtureModel, linears: Mapping[str, LoraFactors]
) -> tuple[list[str], str | None]:
    """The modules that are written whole, and PEFT's task.

    PEFT takes a classifier's head for trained, and will not adapt what is in it; then the task is
    left out.
    """
    saved = modules_to_save(model, model.moelora_config, model.is_classifier)
    if not model.is_classifier:
        return saved, "CAUSAL_LM"
    heads = [name for name in SEQ_CLS_HEAD_NAMES if hasattr(model, name)]
    if not saved or any(head in linear.split(".") for head in heads for linear in linears):
        return saved, None
    return list(dict.fromkeys([*saved, *heads])), "SEQ_CLS"


def exact_targets(
    model: nn.Module, linears: Iterable[str], config: LoraConfig, *shorter: list[str]
) -> str | list[str]:
    """The first target_modules by which PEFT, with the rest of `config`, finds the linears of these
    full names and no others: one of the `shorter`, the names, or a regex.
    """
    names = list(linears)
    modules = [n for n, _ in model.named_modules() if n and not Mixture.owns(n)]
    for targets in (*shorter, names, "|".join(map(re.escape, names))):
        config.target_modules = targets if isinstance(targets, str) else set(targets)  # type: ignore[assignment]
        if {n for n in modules if check_target_module_exists(config, n)} == set(names):
            return targets
    raise ValueError(
        f"PEFT would not adapt exactly the linears {names[:4]} ({len(names)} in all): one of them "
        f"is in a module that is saved whole ({config.modules_to_save}). Use merge_and_unload."
    )


def _saved_tensors(model: MixtureModel, config: LoraConfig) -> dict[str, Tensor]:
    """The tensors of the modules that PEFT will take from the folder whole: those whose names end
    like one of these.
    """
    ends = tuple(config.modules_to_save or ())
    tensors = {}
    owned = set()
    for name, module in model.named_modules():
        if name.endswith(ends) and not model.moelora.owns(name):
            tensors |= {f"{name}.{key}": tensor for key, tensor in module.state_dict().items()}
            owned |= {id(parameter) for parameter in module.parameters()}
    for key, parameter in model.named_parameters(remove_duplicate=False):
        if id(parameter) in owned and key not in tensors:
            raise ValueError(
                f"{key} is the same weight as one in {', '.join(ends)}, which is trained and saved "
                "whole: PEFT would replace only that one. Use merge_and_unload."
            )
    return {
        KEY + key: tensor.detach().to("cpu").contiguous().clone() for key, tensor in tensors.items()
    }
