"""vLLM serves mixtures with their own routers: `vllm serve FOLDER`, `LLM(FOLDER)`."""

from __future__ import annotations

import logging


def register() -> None:
    """Tell vLLM of mixtures: the entry point of `vllm.general_plugins`, called in each process of
    vLLM and perhaps more than once.

    Whatever fails here is logged: vLLM goes on with all other models.
    """
    try:
        from .registration import register_all

        register_all()
    except Exception:
        logging.getLogger(__name__).exception(
            "moelora cannot serve mixtures in this vLLM; other models are not affected."
        )
