"""Names of the libraries around us that are not public, in one place, each with the reason."""

from __future__ import annotations

import re
from importlib import import_module
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as _module
from torch.nn.modules.conv import _ConvNd

# transformers: Trainer looks for this attribute before it trains a quantised base; the base's own
# save_pretrained must not see it, or it takes the model for one with PEFT adapters.
PEFT_ATTACHED = "_hf_peft_config_loaded"
# transformers: the attention implementation that was asked for; AutoConfig swallows the keyword.
attention_of = attrgetter("_attn_implementation")
# transformers: where each module keeps its gradient checkpointing function.
CHECKPOINT_FUNCTION = "_gradient_checkpointing_func"
# transformers: what the Auto classes add to the keywords of from_pretrained.
AUTO_KEYWORDS = ("_from_auto", "adapter_kwargs")

# What takes seconds to import, by its name here: imported when it is first asked for.
_SLOW = {
    # PEFT's own rules of what an adapter can be put on; its public functions apply them to a
    # PeftModel.
    "check_mamba_targets": ("peft.tuners.tuners_utils", "_check_lora_target_modules_mamba"),
    "include_all_linear": ("peft.tuners.tuners_utils", "_maybe_include_all_linear_layers"),
    "in_out_features": ("peft.tuners.tuners_utils", "_get_in_out_features"),
    # bitsandbytes: the scales of a 4-bit weight whose scales are quantised.
    "dequantize_blockwise": ("bitsandbytes.functional", "dequantize_blockwise"),
    # torch: a forward pass that computes shapes alone. The mode has no public name yet.
    "FakeTensorMode": ("torch._subclasses.fake_tensor", "FakeTensorMode"),
}
# torch: the base class of all convolutions.
Convolution = _ConvNd
# torch: the log that prints tracebacks of what FakeTensorMode meets and a real forward does.
FAKE_TENSOR_LOG = "torch._subclasses.fake_tensor"
# bitsandbytes: whether a 4-bit linear packs its weight in eval mode, for CPUs with AVX512-BF16; and
# whether the state of one says that it is packed.
PACKS_IN_EVAL = "support_avx512bf16_for_cpu"
IS_PACKED = "packing_format_for_cpu"
# bitsandbytes: what a 4-bit weight, whose storage may be of any dtype, has beside its numbers.
QUANTISED_STATE = "quant_state"
# torch: whether autograd knows a tensor as a view of another.
is_view = Tensor._is_view
# torch: the hooks on every module of the process, by number; one may keep what it was shown.
GLOBAL_FORWARD_HOOKS = _module._global_forward_hooks
# The standard library's parser has had no public name since 3.11, and only the parsed form shows
# repetitions inside of repetitions (moelora/backtracking.py).
regex_parser: Any = re._parser  # type: ignore[attr-defined]


def __getattr__(name: str) -> Any:
    """One of `_SLOW`."""
    if name not in _SLOW:
        raise AttributeError(f"{__name__} has no {name!r}.")
    module, own = _SLOW[name]
    return getattr(import_module(module), own)


def is_data_parallel_replica(model: nn.Module) -> bool:
    """Whether `nn.DataParallel` made this model for one of its threads: torch marks it so."""
    return getattr(model, "_is_replica", False)


def is_partitioned(parameter: Tensor) -> bool:
    """Whether DeepSpeed's ZeRO-3 took this parameter: each process has a part, and the tensor is
    empty but while its module runs. It says so by an attribute.
    """
    return hasattr(parameter, "ds_id")


def own_part(parameter: Tensor) -> Tensor:
    """This process's part of a parameter that ZeRO-3 took, flat."""
    return parameter.ds_tensor  # type: ignore[attr-defined]


def gradient_is_elsewhere(parameter: Tensor) -> bool:
    """Whether an engine keeps the gradient between micro-batches, so that `grad` is None: FSDP2 and
    DeepSpeed's ZeRO, of whose stages 1 and 2 this attribute is the only sign.
    """
    names = ("full_tensor", "ds_id", "grad_accum")
    return any(hasattr(parameter, name) for name in names)


def assert_in_graph(holds: Tensor, message: str) -> None:
    """Raise RuntimeError when a compiled graph runs and `holds`, 0-dim bool, is False; no public
    check of a tensor's values can be in a graph.
    """
    torch.ops.aten._assert_async.msg(holds, message)


def inside_backward() -> bool:
    """Whether a backward pass is computing something again; torch tells it by this number alone."""
    return backward_number() != -1


def backward_number() -> int:
    """The number of the backward pass that is running in this thread; −1 outside of any."""
    return torch._C._current_graph_task_id()


def checkpoint_functions(model: nn.Module) -> list[nn.Module]:
    """The modules that hold a gradient checkpointing function."""
    return [module for module in model.modules() if CHECKPOINT_FUNCTION in module.__dict__]


def dispatched_forward(model: nn.Module) -> Any:
    """The forward that accelerate keeps on a model that it dispatched, or None."""
    return model.__dict__.get("_old_forward")


def set_dispatched_forward(model: nn.Module, forward: Any) -> None:
    """Put another forward in the place of the one that accelerate keeps."""
    model.__dict__["_old_forward"] = forward


def hooks_of(module: nn.Module) -> list[Any]:
    """The forward hooks and pre-hooks of `module`; torch shows them by the handles alone."""
    return [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
