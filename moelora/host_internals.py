"""Private names of the libraries that moelora lives in, each with the reason why it is needed."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedConfig

# --- checkpoint -----------------------------------------------------------------------------------

# Trainer looks for this attribute before it trains a quantised base; the base's own save_pretrained
# must not see it, or it takes the model for one with PEFT adapters.
PEFT_ATTACHED = "_hf_peft_config_loaded"
# What the Auto classes add to the keywords of from_pretrained.
AUTO_KEYWORDS = ("_from_auto", "adapter_kwargs")


def submodules(module: nn.Module) -> dict[str, nn.Module | None]:
    """The submodules of `module` themselves: taking one out and putting it back where it was in
    their order has no public way.
    """
    return module._modules


def attention_of(config: PreTrainedConfig) -> str | None:
    """The attention implementation that was asked for; AutoConfig swallows the keyword."""
    return config._attn_implementation
