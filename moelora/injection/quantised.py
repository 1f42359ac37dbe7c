"""Bases whose weights are quantised: known by their parameters, and kept from being packed anew."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn

from ..host_internals import IS_PACKED, PACKS_IN_EVAL, QUANTISED_STATE


def is_quantised(model: nn.Module) -> bool:
    """Whether `model` has quantised weights, loaded so or made so afterwards."""
    return getattr(model, "is_quantized", False) or any(map(has_codes, model.parameters()))


def has_codes(weight: Tensor) -> bool:
    """Whether a weight is a quantised linear's: integers, or a tensor that is made of several."""
    if hasattr(weight, "full_tensor"):
        # A part of a sharded weight.
        return False
    parts = hasattr(weight, "__tensor_flatten__") or hasattr(weight, QUANTISED_STATE)
    return parts or not weight.is_floating_point()


def check_can_train(module: nn.Module) -> None:
    """Raise ValueError where a module of `modules_to_save` is quantised.

    Args:
        module: one of the base's.
    """
    for name, weight in module.named_parameters():
        if has_codes(weight):
            raise ValueError(
                f"modules_to_save names a {type(module).__name__} whose {name} is quantised, and "
                "codes cannot be trained: leave it out, or load the base with it left as it is "
                "(llm_int8_skip_modules, modules_to_not_convert of its quantization_config)."
            )


def stop_packing(model: nn.Module) -> list[str]:
    """Have bitsandbytes' 4-bit linears keep their weights as they are; the names of those that
    would not have.

    On a CPU with AVX512-BF16 their first forward in eval mode packs the weight for a faster product
    in 16 bits, in place: no gradient passes through it any more, the scales are rounded to 16 bits,
    and `state_dict()` unpacks it wrongly. Without it a linear gives the same in eval mode as in
    training.

    Raises:
        ValueError: a weight is packed already.
    """
    stopped = []
    for name, module in model.named_modules():
        if not getattr(module, PACKS_IN_EVAL, False):
            continue
        state = getattr(getattr(module, "weight", None), QUANTISED_STATE, None)
        if getattr(state, IS_PACKED, False):
            raise ValueError(
                f"The weight of {name} is packed: this base has run in eval mode, where "
                "bitsandbytes rounds its 4-bit weights on this kind of CPU, and hides them from "
                "gradients. Load the base again, and give it a mixture before it runs: "
                "from_base(folder, config, quantization_config=…)."
            )
        setattr(module, PACKS_IN_EVAL, False)
        stopped.append(name)
    return stopped


def resume_packing(model: nn.Module, names: Iterable[str]) -> None:
    """Let these linears do again what `stop_packing` kept them from."""
    for name in names:
        setattr(model.get_submodule(name), PACKS_IN_EVAL, True)
