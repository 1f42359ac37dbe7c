"""What vLLM is told of mixtures, once in each of its processes."""

from __future__ import annotations

from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from vllm import ModelRegistry
from vllm.model_executor.models.config import MODELS_CONFIG_MAP
from vllm.transformers_utils.config import _CONFIG_REGISTRY

from ..modeling import MoeLoraForCausalLM
from .config import ARCHITECTURE, MoeLoraConfig, TokenizerOfBase
from .settings import MixtureSettings


def register_all() -> None:
    """Register the configuration, the tokenizer, the engine settings and the model."""
    # vLLM makes this class that of AutoConfig for "moelora": transformers' own Auto classes must
    # know it as well, or a mixture could not be loaded in the same process.
    _CONFIG_REGISTRY[MoeLoraConfig.model_type] = MoeLoraConfig
    AutoConfig.register(MoeLoraConfig.model_type, MoeLoraConfig, exist_ok=True)
    AutoModelForCausalLM.register(MoeLoraConfig, MoeLoraForCausalLM, exist_ok=True)
    AutoTokenizer.register(MoeLoraConfig, fast_tokenizer_class=TokenizerOfBase, exist_ok=True)
    MODELS_CONFIG_MAP[ARCHITECTURE] = MixtureSettings
    if ARCHITECTURE not in ModelRegistry.get_supported_archs():
        ModelRegistry.register_model(ARCHITECTURE, f"moelora.vllm.model:{ARCHITECTURE}")
