"""Which features of a PEFT LoRA a mixture can hold exactly; every other one is refused with its
reason.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import MISSING, fields
from typing import Any

from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists

# Fields that say how an adapter came about or which file is whose, or that are read where they
# matter.
HARMLESS = {
    "task_type",
    "peft_type",
    "auto_mapping",
    "peft_version",
    "base_model_name_or_path",
    "revision",
    "inference_mode",
    "r",
    "target_modules",
    "exclude_modules",
    "lora_alpha",
    "lora_dropout",
    # How the base's weight lies in memory; A and B lie the same way for Conv1D as for Linear.
    "fan_in_fan_out",
    "use_rslora",
    "layers_to_transform",
    "layers_pattern",
    "rank_pattern",
    "alpha_pattern",
    "megatron_core",
    # Settings of initialisations, which `init_lora_weights` stands for.
    "loftq_config",
    "eva_config",
    "corda_config",
    "lora_ga_config",
    "qalora_group_size",
    # Never saved: where a live model computes.
    "runtime_config",
    # Here the file's tensors tell, see `Adapter.saved`.
    "modules_to_save",
}
REASONS = {
    "bias": "it trained biases of the base, which belong to all tokens, not to those of one expert",
    "lora_bias": "its B has a bias, which an expert has not",
    "use_dora": "DoRA rescales the base's own output by a learned magnitude: not a delta that can be weighted "
    "and added. Train it without use_dora",
    "trainable_token_indices": "it trained token embeddings, which are looked up before any router has run",
    "layer_replication": "it adds layers to the base",
    "megatron_config": "its layers are Megatron's parallel ones",
    "alora_invocation_tokens": "aLoRA acts only after its invocation tokens",
    "target_parameters": "it adapts bare parameters (fused experts), not linears",
}
# Initialisations that leave the base as it is: what is saved is the whole change.
PLAIN_INITS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")
# Initialisations that take the first A and B out of the base's weights (arXiv:2404.02948 and
# others).
BASE_CHANGING_INITS = ("pissa", "olora", "corda", "lora_ga", "loftq")


def unsupported(config: Mapping[str, Any]) -> list[str]:
    """What in an adapter_config.json keeps its adapter from being an expert; empty where nothing
    does.
    """
    kind = str(config.get("peft_type") or "").rpartition(".")[2]
    if kind == "XLORA":
        return [
            "it is an X-LoRA checkpoint of several adapters: pass its folder in place of the whole dict"
        ]
    if kind != "LORA":
        return [f"peft_type is {kind or 'missing'}; only LORA adapters can become experts"]
    found = []
    defaults = {f.name: _default(f) for f in fields(LoraConfig)}
    for name, value in config.items():
        if name in HARMLESS or name == "init_lora_weights":
            continue
        # A field that this PEFT does not know is off where it is empty.
        default = defaults.get(name)
        if value != default and (value or default):
            reason = REASONS.get(name, "what it does is not the plain delta s·BA of an expert")
            found.append(f"{name}={_short(value)}: {reason}")
    return found + _initialisation(config.get("init_lora_weights", True))


def unnamed(config: Mapping[str, Any], linears: Iterable[str]) -> list[str]:
    """The linears that the adapter's own target_modules does not name: PEFT would leave their
    tensors out.

    Raises:
        ValueError, TypeError: the configuration is not one that PEFT takes.
    """
    targets = config.get("target_modules")
    if targets is None or (isinstance(targets, str) and targets.lower() == "all-linear"):
        return []
    lora = LoraConfig(
        target_modules=targets,
        exclude_modules=config.get("exclude_modules"),
        layers_to_transform=config.get("layers_to_transform"),
        layers_pattern=config.get("layers_pattern"),
    )
    return [linear for linear in linears if not check_target_module_exists(lora, linear)]


def _initialisation(how: Any) -> list[str]:
    if any(how is plain or (isinstance(how, str) and how == plain) for plain in PLAIN_INITS):
        return []
    if isinstance(how, str) and how.lower().startswith(BASE_CHANGING_INITS):
        remedy = (
            "convert it with PEFT: save_pretrained(…, path_initial_model_for_weight_conversion=…)"
        )
        if how.lower() == "loftq":
            remedy = "merge it into the base that LoftQ made, or train it without"
        return [
            f"init_lora_weights={how!r} changed the base's weights when training began, so that A and B are no "
            f"delta on the base as it is: {remedy}"
        ]
    return [f"init_lora_weights={_short(how)} is not known; expected one of: {_names(PLAIN_INITS)}"]


def _default(field: Any) -> Any:
    if field.default is not MISSING:
        return field.default
    return field.default_factory() if field.default_factory is not MISSING else None


def _names(values: tuple) -> str:
    return ", ".join(str(v) for v in values)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
