"""What of a PEFT LoRA's configuration a mixture can hold exactly; the rest is refused."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists

from ..validation import shown
from .patterns import Patterns

HARMLESS = {
    # How the adapter came about, and which file is whose.
    *("task_type", "peft_type", "peft_version", "auto_mapping", "inference_mode"),
    *("base_model_name_or_path", "revision"),
    # Read where they matter; whether `modules_to_save` trained anything, the file's tensors tell.
    *("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
    *("modules_to_save", "lora_dropout"),
    # How the base's weight lies in memory; A and B lie the same way for Conv1D as for Linear.
    "fan_in_fan_out",
    # Settings of initialisations, which `init_lora_weights` stands for.
    *("loftq_config", "eva_config", "corda_config", "lora_ga_config", "qalora_group_size"),
    # Where a live model computes, and with which parallel layers.
    *("runtime_config", "megatron_core"),
}
REASONS = {
    "bias": "it trained biases of the base, which belong to all tokens, not to those of one expert",
    "lora_bias": "its B has a bias, which an expert does not have",
    "use_dora": "DoRA rescales the base's own output by a learned magnitude: not a delta that can "
    "be weighted and added. Train it without use_dora",
    "trainable_token_indices": "it trained token embeddings, which are looked up before any router "
    "has run",
    "layer_replication": "it adds layers to the base",
    "megatron_config": "its layers are Megatron's parallel ones",
    "alora_invocation_tokens": "aLoRA acts only after its invocation tokens",
    "target_parameters": "it adapts bare parameters (fused experts), not linears",
    "init_lora_weights": "it is not known to leave the base as it is. PiSSA, OLoRA, CorDA, LoRA-GA "
    "and LoftQ changed the base's weights when training began, so that A and B are not a delta on "
    "it: convert the adapter with PEFT (save_pretrained(…, "
    "path_initial_model_for_weight_conversion=…)), or merge it into the base that it was made for",
}
# Initialisations that leave the base as it is: what is saved is the whole change.
PLAIN_INITS = (None, True, False, "gaussian", "eva", "orthogonal", "mica")


def refused_settings(config: Mapping[str, Any]) -> list[str]:
    """The settings in an adapter_config.json that no expert can have, each with its reason."""
    kind = str(config.get("peft_type") or "").rpartition(".")[2]
    if kind == "XLORA":
        return [
            "it is an X-LoRA checkpoint of several adapters: pass its folder in place of the whole "
            "dict"
        ]
    if kind != "LORA":
        return [f"peft_type is {kind or 'missing'}; only LORA adapters can become experts"]
    reasons = []
    defaults = LoraConfig().to_dict()
    for name, value in config.items():
        default = defaults.get(name)
        plain = PLAIN_INITS if name == "init_lora_weights" else (default,)
        # A field that this PEFT does not know is off where it is empty.
        if name not in HARMLESS and value not in plain and (value or default):
            reason = REASONS.get(name, "what it does is not the plain delta s·BA of an expert")
            reasons.append(f"{name}={shown(value)}: {reason}")
    return reasons


def untargeted(
    config: Mapping[str, Any], linears: Collection[str], patterns: Patterns
) -> list[str]:
    """The `linears` of an adapter that its own target_modules does not match, so that PEFT would
    leave their tensors out; any error where PEFT does not take the configuration.
    """
    targets = config.get("target_modules")
    if targets is None or (isinstance(targets, str) and targets.lower() == "all-linear"):
        return []
    excluded = config.get("exclude_modules")
    in_layers = config.get("layers_pattern")
    for name in [in_layers] if isinstance(in_layers, str) else in_layers or []:
        # PEFT makes a regular expression of it, which is therefore checked here.
        if not all(part.isidentifier() for part in str(name).split(".")):
            raise ValueError(f"layers_pattern={shown(name)} is not a module's name")
    lora = LoraConfig(
        target_modules=targets,
        exclude_modules=None if isinstance(excluded, str) else excluded,
        layers_to_transform=config.get("layers_to_transform"),
        layers_pattern=in_layers,
    )

    def is_target(linear: str) -> bool:
        if isinstance(excluded, str) and patterns.matches(excluded, linear):
            return False
        if isinstance(targets, str):
            lora.target_modules = [linear] if patterns.matches(targets, linear) else []
        return bool(check_target_module_exists(lora, linear))

    return [linear for linear in linears if not is_target(linear)]
