"""Bases that are sharded before they have a mixture, by tensor parallelism or FSDP2: refused."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedModel

# The keywords by which from_pretrained shards what it loads.
SHARDING = ("distributed_config", "tp_plan", "tp_size", "device_mesh")
REMEDY = (
    "load the base whole and shard the mixture over the processes (DistributedDataParallel, FSDP2 "
    "or DeepSpeed ZeRO-3: examples/distributed), or spread it over the devices of one process with "
    'device_map="auto"'
)


def check_not_to_be_sharded(kwargs: Mapping[str, Any]) -> None:
    """Raise ValueError where keywords of from_pretrained ask for a sharded base.

    Args:
        kwargs: the keywords.
    """
    asked = [f"{name}={kwargs[name]!r}" for name in SHARDING if kwargs.get(name) is not None]
    if asked:
        raise ValueError(
            f"{', '.join(asked)} would give each process a part of every linear, and experts read "
            f"and add to whole ones: {REMEDY}."
        )


def check_whole(model: PreTrainedModel) -> None:
    """Raise ValueError where this process has parts of a base's weights, so that experts would read
    or add to a part of what belongs to them.

    Args:
        model: the base.
    """
    size = getattr(model, "tp_size", None) or 1
    sharded = [name for name, p in model.named_parameters() if hasattr(p, "full_tensor")]
    if size == 1 and not sharded:
        return
    how = f"tensor-parallel over {size} processes" if size > 1 else f"sharded ({sharded[0]} …)"
    raise ValueError(f"This {type(model).__name__} is {how} before it has a mixture: {REMEDY}.")
