"""Private names of the libraries that this package builds on, each with the reason for its use."""

from __future__ import annotations

from transformers import PreTrainedConfig

# --- adapters ---


def commit_of_config(config: PreTrainedConfig) -> str | None:
    """The hub commit that a configuration was loaded from, or None."""
    # transformers notes it there alone, and an exported adapter names it as its base's revision.
    return getattr(config, "_commit_hash", None)
