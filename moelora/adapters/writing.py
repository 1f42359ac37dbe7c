"""Writing a PEFT LoRA folder: its configuration and its tensors, both in place at once."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping
from os import PathLike
from pathlib import Path

import torch
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.constants import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, SEQ_CLS_HEAD_NAMES
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..checkpoint.atomic import atomic_folder
from ..core.experts import LoraFactors
from ..core.model import MixtureModel, base_class
from ..host_internals import commit_of_config
from ..injection.sites import modules_to_save

KEY = "base_model.model."
# What a folder may hold that `overwrite` replaces: an adapter as PEFT or this package writes it,
# and no more.
REPLACEABLE = {CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, "README.md", ".gitattributes"}


def write_adapter(
    model: MixtureModel,
    deltas: Mapping[str, LoraFactors],
    folder: str | PathLike[str],
    *,
    dtype: torch.dtype | None,
    overwrite: bool,
) -> None:
    """Write `deltas` and the trained head of `model` as a PEFT LoRA.

    Args:
        model: the model that the deltas belong to.
        deltas: the factors by the linear's full name.
        folder: the folder to write.
        dtype: of A and B; None keeps theirs.
        overwrite: replace a folder that holds an adapter.

    Raises:
        ValueError: values that are not finite (in `dtype`), or a trained module whose weights are
            tied.
        FileExistsError: the folder is not empty.
        OSError: the folder cannot be written.
    """
    check_folder(folder, overwrite)
    config, ranks = _config(model, deltas)
    tensors = _saved_tensors(model, config)
    for linear, factors in deltas.items():
        A = _padded(factors.A, ranks[linear])
        B = _padded(factors.B, ranks[linear]).T
        for part, tensor in (("lora_A", A), ("lora_B", B)):
            tensor = tensor.detach().to("cpu", dtype or tensor.dtype).contiguous()
            if not bool(tensor.isfinite().all()):
                raise ValueError(
                    f"{part} of {linear} contains NaN or Inf in {tensor.dtype}: nothing was "
                    "written. Check the expert, or export with a dtype of larger range."
                )
            tensors[f"{KEY}{linear}.{part}.weight"] = tensor
    with atomic_folder(folder, replace=True, what="adapter") as staging:
        config.save_pretrained(str(staging), auto_mapping_dict=_auto_mapping(model, config))
        save_file(tensors, staging / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
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
            f"{path} is not empty ({', '.join(names[:4])}): choose another folder, or pass "
            "overwrite=True."
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
    stable = ours.use_rslora and None not in _alphas(model, deltas, True).values()
    ranks = {}
    alphas = {}
    for linear, alpha in _alphas(model, deltas, stable).items():
        rank = len(deltas[linear].A)
        ranks[linear] = rank if alpha is not None else 2 ** math.ceil(math.log2(rank))
        alphas[linear] = alpha if alpha is not None else deltas[linear].scaling * ranks[linear]
    rank, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    saved, task = _saved_and_task(model, deltas)
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        rank_pattern={_pattern(n): r for n, r in ranks.items() if r != rank},
        alpha_pattern={_pattern(n): a for n, a in alphas.items() if a != alpha},
        use_rslora=stable,
        lora_dropout=ours.lora_dropout,
        fan_in_fan_out=any(isinstance(model.get_submodule(name), Conv1D) for name in deltas),
        modules_to_save=saved or None,
        task_type=task,
        inference_mode=True,
        base_model_name_or_path=_base_name(model),
        revision=ours.base_revision or commit_of_config(model.config),
    )
    config.target_modules = _targets(model, list(deltas), config)
    return config, ranks


def _alphas(
    model: MixtureModel, deltas: Mapping[str, LoraFactors], stable: bool
) -> dict[str, float | None]:
    """For each linear an alpha from which PEFT computes exactly its scaling, or None; integers
    where they do.
    """
    configured = list(model.moelora_config._per_expert("lora_alpha"))
    alphas: dict[str, float | None] = {}
    for linear, factors in deltas.items():
        norm = math.sqrt(len(factors.A)) if stable else len(factors.A)
        alpha = factors.scaling * norm
        near = [
            *configured,
            round(alpha),
            alpha,
            math.nextafter(alpha, -math.inf),
            math.nextafter(alpha, math.inf),
        ]
        alphas[linear] = next((a for a in near if a / norm == factors.scaling), None)
    return alphas


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


def _targets(model: MixtureModel, linears: list[str], config: LoraConfig) -> str | list[str]:
    """The shortest target_modules by which PEFT finds exactly `linears`: ends of names, names, or a
    regex.
    """
    modules = [n for n, _ in model.named_modules() if n and not model.moelora.owns(n)]
    ends = list(dict.fromkeys(name.rpartition(".")[2] for name in linears))
    for targets in (ends, linears, "|".join(map(re.escape, linears))):
        config.target_modules = targets
        if {n for n in modules if check_target_module_exists(config, n)} == set(linears):
            return targets
    raise ValueError(
        f"PEFT would not adapt exactly the linears {linears[:4]} ({len(linears)} in all): one of "
        f"them lies in a module that is saved whole ({config.modules_to_save}). Use "
        "merge_and_unload."
    )


def _pattern(linear: str) -> str:
    """A key of rank_pattern that PEFT's `get_pattern_key` matches with this linear alone."""
    return "^" + re.escape(linear)


def _saved_tensors(model: MixtureModel, config: LoraConfig) -> dict[str, Tensor]:
    """The tensors of the modules that PEFT will take from the folder whole: those whose names end
    like one of these.
    """
    names = tuple(config.modules_to_save or ())
    modules = {
        n: m
        for n, m in model.named_modules()
        if names and n.endswith(names) and not model.moelora.owns(n)
    }
    tensors = {f"{n}.{k}": t for n, m in modules.items() for k, t in m.state_dict().items()}
    owned = {id(p) for m in modules.values() for p in m.parameters()}
    for key, parameter in model.named_parameters(remove_duplicate=False):
        if id(parameter) in owned and key not in tensors:
            raise ValueError(
                f"{key} is the same weight as one in {', '.join(modules)}, which is trained and "
                "saved whole: PEFT would replace only that one. Use merge_and_unload."
            )
    return {
        KEY + key: tensor.detach().to("cpu").contiguous().clone() for key, tensor in tensors.items()
    }


def _padded(rows: Tensor, rank: int) -> Tensor:
    """`rows` `[r, width]` with rows of zeros after them, up to `rank`."""
    return nn.functional.pad(rows, (0, 0, 0, rank - len(rows)))


def _base_name(model: MixtureModel) -> str | None:
    """Where the base came from; a folder by its whole path, since an adapter is loaded from
    anywhere.
    """
    name = model.config.name_or_path
    return str(Path(name).resolve()) if name and Path(name).is_dir() else name or None


def _auto_mapping(model: MixtureModel, config: LoraConfig) -> dict[str, str] | None:
    """What PEFT's Auto classes need where there is no task that says the base's class."""
    if config.task_type is not None:
        return None
    base = base_class(type(model))
    return {"base_model_class": base.__name__, "parent_library": base.__module__}
