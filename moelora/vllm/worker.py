"""What an engine's processes can be asked for by name: `llm.collective_rpc("load_experts", …)`."""

from __future__ import annotations

from typing import Any

from ..config import NO_EXPERT
from .requests import KEY


class MixtureWorker:
    """Methods that vLLM adds to its workers, for engines that serve a mixture."""

    model_runner: Any
    vllm_config: Any

    def load_experts(self, folder: str) -> None:
        """Take the experts, routers and saved modules of another checkpoint of the same mixture.

        Call `reset_prefix_cache` of the engine with it: cached keys and values are the old ones'.

        Args:
            folder: which `save_pretrained` wrote.

        Raises:
            ValueError: it is of another mixture or another base; nothing has changed then.
        """
        self.model_runner.get_model().load_experts(folder)

    def take_routing_reports(self) -> dict[str, dict[str, float]]:
        """The shares of each expert in the slots of requests that asked for a `routing_report`, by
        that name, since they were last taken. "(base)" are slots where no expert acted.
        """
        requests = self.vllm_config.compilation_config.static_forward_context[KEY]
        config = self.model_runner.get_model().config
        names = [NO_EXPERT, *(config.expert_names or [])]
        return {
            label: dict(zip(names, (counts / counts.sum()).tolist()))
            for label, counts in requests.take_reports().items()
        }
