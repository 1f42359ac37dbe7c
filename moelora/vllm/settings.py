"""What a mixture asks of the engine's settings: set where that changes no answer, else refused."""

from __future__ import annotations

from typing import Any

from vllm.config import CUDAGraphMode, VllmConfig
from vllm.config.compilation import CompilationMode
from vllm.logger import init_logger
from vllm.model_executor.models.config import MODELS_CONFIG_MAP, VerifyAndUpdateConfig

from ..placement import not_lora
from ..registry import router_class
from .choices import tracker_for
from .config import MoeLoraConfig

logger = init_logger(__name__)

EXTENSION = "moelora.vllm.worker.MixtureWorker"
# The key of `additional_config` that holds what is the mixture's.
OWN = "moelora"
OWN_SETTINGS = {
    "transformers_backend": "run the base through vLLM's Transformers backend",
    "allow_base_mismatch": "serve the experts on a base that is not theirs",
}


def own_settings(vllm_config: VllmConfig) -> dict[str, bool]:
    """What `additional_config={"moelora": {…}}` says, all of it False by default.

    Raises:
        ValueError: a setting that there is not, or one that is neither True nor False.
    """
    extra = vllm_config.additional_config
    given = extra.get(OWN, {}) if isinstance(extra, dict) else {}
    if not isinstance(given, dict) or not all(type(value) is bool for value in given.values()):
        raise ValueError(f"additional_config[{OWN!r}]={given!r}; expected names with true or false")
    if unknown := sorted(given.keys() - OWN_SETTINGS.keys()):
        known = ", ".join(f"{name} ({what})" for name, what in OWN_SETTINGS.items())
        raise ValueError(f"additional_config[{OWN!r}] has no {unknown}; expected: {known}.")
    return {**dict.fromkeys(OWN_SETTINGS, False), **given}


class MixtureSettings(VerifyAndUpdateConfig):
    """vLLM calls this once for every engine of a mixture, before any process of it starts."""

    @staticmethod
    def verify_and_update_config(vllm_config: VllmConfig) -> None:
        """Check that the mixture can be served exactly, and set what it needs.

        Args:
            vllm_config: of the engine.

        Raises:
            ValueError: it cannot, with the remedy.
        """
        model = vllm_config.model_config
        config = model.hf_config
        _settings_of_base(vllm_config, config)
        own_settings(vllm_config)
        check_experts(config, vllm_config.parallel_config.tensor_parallel_size)
        check_engine(vllm_config)
        if config.reads_prompts:
            _read_whole_prompts(vllm_config)
        shares_prefixes = bool(vllm_config.cache_config.enable_prefix_caching)
        no_graphs = vllm_config.compilation_config.cudagraph_mode == CUDAGraphMode.NONE
        has_graphs = not (_is_cpu(vllm_config) or model.enforce_eager or no_graphs)
        tracker = tracker_for(
            config,
            shares_prefixes=shares_prefixes,
            has_graphs=has_graphs,
            is_v2=vllm_config.use_v2_model_runner,
        )
        model.logits_processors = [*(model.logits_processors or []), tracker]
        if not vllm_config.parallel_config.worker_extension_cls:
            vllm_config.parallel_config.worker_extension_cls = EXTENSION


def check_experts(config: MoeLoraConfig, tensor_parallel_size: int) -> None:
    """Raise ValueError where the experts are of a kind that vLLM's linears cannot take exactly.

    Args:
        config: the mixture's.
        tensor_parallel_size: over how many processes each linear is cut.
    """
    if config.target_blocks:
        raise ValueError(
            f"target_blocks={config.target_blocks} are more than one linear each, and vLLM builds "
            "modules of its own: serve this mixture with transformers, or train experts on "
            "target_modules alone."
        )
    if tensor_parallel_size > 1 and (reasons := not_lora(config)):
        raise ValueError(
            f"With tensor_parallel_size={tensor_parallel_size} a process has a part of what "
            f"experts read, and {' and '.join(reasons)}: use tensor_parallel_size=1."
        )


def check_engine(vllm_config: VllmConfig) -> None:
    """Raise ValueError for settings under which a mixture would not be served exactly.

    Args:
        vllm_config: of the engine.
    """
    model = vllm_config.model_config
    parallel = vllm_config.parallel_config
    stock = vllm_config.compilation_config.mode == CompilationMode.STOCK_TORCH_COMPILE
    refused = {
        "pipeline parallelism cuts sites and routers apart; use tensor_parallel_size "
        "instead of pipeline_parallel_size": parallel.pipeline_parallel_size > 1,
        "context parallelism cuts prompts apart; set prefill_context_parallel_size and "
        "decode_context_parallel_size to 1": _context_parallel(parallel) > 1,
        "dual batch overlap routes two halves; leave enable_dbo out": parallel.use_ubatching,
        "speculative decoding leaves no room for what knows the requests; leave "
        "speculative_config out": vllm_config.speculative_config is not None,
        "a mixture generates; leave runner and convert at their defaults": model.runner_type
        != "generate",
        "vLLM's own LoRA beside a mixture would be added to linears that experts read; leave "
        "enable_lora out": vllm_config.lora_config is not None,
        "routers read whole prompts or tokens' ids, which these requests do not bring; leave "
        "enable_prompt_embeds and kv_transfer_config out, or use routing_level='token' with a "
        "router that reads hidden states": _needs_ids(model.hf_config)
        and (model.enable_prompt_embeds or vllm_config.kv_transfer_config is not None),
        "experts are added outside of the compiled graph, which this mode makes one; use "
        "vLLM's own compilation mode or enforce_eager": stock,
    }
    for reason, is_asked in refused.items():
        if is_asked:
            raise ValueError(f"A mixture cannot be served so: {reason}.")


def _needs_ids(config: MoeLoraConfig) -> bool:
    return config.reads_prompts or router_class(config.router).reads == "input_ids"


def _context_parallel(parallel: Any) -> int:
    sizes = ("prefill_context_parallel_size", "decode_context_parallel_size")
    return max(getattr(parallel, name, 1) for name in sizes)


def _is_cpu(vllm_config: VllmConfig) -> bool:
    return str(vllm_config.device_config.device) == "cpu"


def _settings_of_base(vllm_config: VllmConfig, config: MoeLoraConfig) -> None:
    """What vLLM itself would set for the base alone."""
    settings = MODELS_CONFIG_MAP.get(config.base_architecture or "")
    if settings is None:
        return
    model = vllm_config.model_config
    model.hf_config = config.base()
    try:
        settings.verify_and_update_model_config(model)
        settings.verify_and_update_config(vllm_config)
    finally:
        model.hf_config = config


def _read_whole_prompts(vllm_config: VllmConfig) -> None:
    """Routers that read a prompt need all of it in one step, and its own keys and values."""
    model = vllm_config.model_config
    scheduler = vllm_config.scheduler_config
    cache = vllm_config.cache_config
    logger.info(
        "The mixture's routers read whole prompts: chunked prefill and prefix caching are off."
    )
    scheduler.enable_chunked_prefill = False
    scheduler.max_num_batched_tokens = max(scheduler.max_num_batched_tokens, model.max_model_len)
    cache.enable_prefix_caching = False
    if not _is_cpu(vllm_config):
        # The choice of a request is made in Python, which a recorded graph would not run again.
        vllm_config.compilation_config.cudagraph_mode = CUDAGraphMode.NONE
