"""`Requests`: which request stands at which place of the batch, as vLLM's V1 runner tells it before
each forward pass.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from vllm import SamplingParams
from vllm.config import VllmConfig
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor, MoveDirectionality

# Where the engine's own requests are, among what vLLM keeps for each forward pass.
KEY = "moelora.requests"
# How many finished requests' routings are kept, the oldest going first.
KEPT_REPORTS = 1000


class Slots(NamedTuple):
    """Which experts act on rows: ids `[n, K]`, −1 for none, and weights `[n, K]`; and the
    logits of what blends the prompt with tokens, `[1, C]`, or None.
    """

    ids: Tensor
    weights: Tensor


@dataclass
class Request:
    """A request while it is in the batch.

    Args:
        prompt_length: in tokens.
        choice: what it decides itself, or None.
        slots: what a sequence router chose for it, by the router's number.
        prompts: what a blending router makes of its prompt, `[1, C]`, likewise.
        counts: how often each expert was chosen for it by each router, where it asked for that.
    """

    prompt_length: int
    choice: Any = None
    slots: dict[int, Slots] = field(default_factory=dict)
    prompts: dict[int, Tensor] = field(default_factory=dict)
    counts: dict[int, Tensor] = field(default_factory=dict)


class Rows(NamedTuple):
    """A request's rows in one step.

    Args:
        request: whose they are.
        start, stop: the rows.
        before: how many of its tokens were computed in earlier steps.
    """

    request: Request
    start: int
    stop: int
    before: int


class Requests(LogitsProcessor):
    """A logits processor that leaves logits alone: the documented way to see requests come, move
    and go.

    Attributes:
        read: what the parameters of a request decide; see `choices`.
    """

    read: Callable[[SamplingParams | None], Any]

    def __init__(self, vllm_config: VllmConfig, device: torch.device, is_pin_memory: bool):
        self.slots: dict[int, Request] = {}
        self.reports: dict[str, Tensor] = {}
        # Of this engine: several may live in one process.
        vllm_config.compilation_config.static_forward_context[KEY] = self

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        """Refuse a request before it is queued.

        Args:
            sampling_params: of the request.

        Raises:
            ValueError: it asks for what this mixture does not have.
        """
        try:
            cls.read(sampling_params)
        except TypeError as error:
            # vLLM answers a client with ValueErrors; other errors it takes for its own.
            raise ValueError(str(error)) from error

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
            self._keep(slots.pop(index, None))
        for index, params, prompt, _ in batch_update.added:
            self._keep(slots.pop(index, None))
            slots[index] = Request(len(prompt or ()), type(self).read(params))
        for one, other, how in batch_update.moved:
            first = slots.pop(one, None)
            second = slots.pop(other, None)
            if first is not None:
                slots[other] = first
            if how != MoveDirectionality.SWAP:
                # It was in the place of one that is gone.
                self._keep(second)
            elif second is not None:
                slots[one] = second

    def rows(self, starts: list[int], lengths: list[int]) -> list[Rows]:
        """The rows of each request in a step, in their order.

        Args:
            starts: where each request's rows begin, and where the last one's end.
            lengths: how many tokens each has after this step.

        Raises:
            RuntimeError: vLLM computes for a request that it has not told of.
        """
        rows = []
        for i, (start, stop) in enumerate(pairwise(starts)):
            if stop == start:
                continue
            if i not in self.slots:
                raise RuntimeError(
                    f"vLLM computes tokens for place {i} of the batch, and its logits processors "
                    "were told of no request there: this version of vLLM is not served."
                )
            rows.append(Rows(self.slots[i], start, stop, lengths[i] - (stop - start)))
        return rows

    def take_reports(self) -> dict[str, Tensor]:
        """How often each expert acted, no expert first, by the name that a request gave: of those
        that are finished and of those under way, since they were last taken.
        """
        for request in self.slots.values():
            self._keep(request)
        taken = self.reports
        self.reports = {}
        return taken

    def _keep(self, request: Request | None) -> None:
        """Keep the routing of a request that asked for it, and may go now."""
        label = None if request is None or request.choice is None else request.choice.report
        if request is None or label is None or not request.counts:
            return
        counts = torch.stack(list(request.counts.values())).sum(0)
        request.counts = {}
        before = self.reports.pop(label, None)
        self.reports[label] = counts if before is None else before + counts
        while len(self.reports) > KEPT_REPORTS:
            self.reports.pop(next(iter(self.reports)))
