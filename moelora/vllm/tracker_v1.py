"""Requests as vLLM's V1 runner tells of them: a logits processor hears who comes, moves, goes."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from vllm.config import VllmConfig
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor, MoveDirectionality

from .requests import Checks, Request, Requests, Rows


class TrackerV1(Checks, LogitsProcessor, Requests):
    """A logits processor that leaves logits alone: the documented way to see requests come, move
    and go.
    """

    def __init__(self, vllm_config: VllmConfig, device: torch.device, is_pin_memory: bool):
        Requests.__init__(self, vllm_config)
        self.slots: dict[int, Request] = {}

    def is_argmax_invariant(self) -> bool:
        """Greedy sampling need not ask."""
        return True

    def apply(self, logits: Tensor) -> Tensor:
        """The same logits.

        Args:
            logits: `[batch, vocabulary]`.
        """
        return logits

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """Follow the batch.

        Args:
            batch_update: who came, went and moved; None for nobody.
        """
        if batch_update is None:
            return
        slots = self.slots
        for index in batch_update.removed:
            self.keep(slots.pop(index, None))
        for index, params, prompt, _ in batch_update.added:
            self.keep(slots.pop(index, None))
            slots[index] = Request(len(prompt or ()), type(self).read(params))
        for one, other, how in batch_update.moved:
            first = slots.pop(one, None)
            second = slots.pop(other, None)
            if first is not None:
                slots[other] = first
            if how != MoveDirectionality.SWAP:
                # It was in the place of one that is gone.
                self.keep(second)
            elif second is not None:
                slots[one] = second

    def under_way(self) -> Iterable[Request]:
        """Those that have a place in the batch."""
        return self.slots.values()

    def rows(self, attention: Any) -> list[Rows]:
        """See `Requests.rows`; the places are numbered as in the batch.

        Args:
            attention: by layer its metadata.
        """
        if not self.slots or not attention:
            return []
        some = next(iter(attention.values()))
        lengths = some.seq_lens.tolist()
        rows = []
        for i, (start, stop) in enumerate(pairwise(some.query_start_loc.tolist())):
            if stop == start:
                continue
            if i not in self.slots:
                raise RuntimeError(
                    f"vLLM computes tokens for place {i} of the batch, and its logits processors "
                    "were told of no request there: this version of vLLM is not served."
                )
            rows.append(Rows(self.slots[i], start, stop, lengths[i] - (stop - start)))
        return rows
