"""How the base of a checkpoint was quantised when it was loaded: it is loaded like that again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel

from ..config import MoeLoraConfig
from ..injection.base import ACCESS

# The keyword of the base's from_pretrained, and the key in its configuration.
HOW = "quantization_config"
FOUND_BY = (*ACCESS, "revision", "subfolder")


def is_quantised_at_load(model: PreTrainedModel) -> bool:
    """Whether `model` was quantised by its from_pretrained, from weights that are not."""
    quantizer = getattr(model, "hf_quantizer", None)
    return quantizer is not None and not quantizer.pre_quantized


def as_it_was(where: Any, saved: MoeLoraConfig, keywords: Mapping[str, Any]) -> dict[str, Any]:
    """`keywords` for the from_pretrained of the base at `where`, with the quantisation that it had
    when it was saved, unless they name one, or the base is stored quantised.
    """
    how = (saved.base_config or {}).get(HOW)
    if how is None or keywords.get(HOW) is not None:
        return dict(keywords)
    found_by = {k: keywords[k] for k in FOUND_BY if keywords.get(k) is not None}
    stored, _ = PreTrainedConfig.get_config_dict(where, **found_by)
    return dict(keywords) if stored.get(HOW) else {**keywords, HOW: how}
