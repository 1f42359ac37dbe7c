"""The requests under way: what each of them decided, where its rows are in this step, and which
experts acted on it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from vllm import SamplingParams
from vllm.config import VllmConfig

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


class Checks:
    """The part of a logits processor, V1's or V2's, that vLLM asks whether it may take a request.

    Attributes:
        read: what the parameters of a request decide; see `choices`.
    """

    read: Callable[[SamplingParams | None], Any]

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        """Refuse a request before it is queued.

        Args:
            sampling_params: of the request.

        Raises:
            ValueError: it asks for what this mixture does not have.
        """
        cls.read(sampling_params)


class Requests(ABC):
    """What a model asks of its engine's requests, whichever of vLLM's runners tells of them.

    Args:
        vllm_config: of the engine, which keeps this: several may live in one process.
    """

    def __init__(self, vllm_config: VllmConfig):
        self.reports: dict[str, Tensor] = {}
        vllm_config.compilation_config.static_forward_context[KEY] = self

    @abstractmethod
    def under_way(self) -> Iterable[Request]:
        """Those that are in the batch or wait in their place."""

    @abstractmethod
    def rows(self, attention: Any) -> list[Rows]:
        """The rows of each request in this step, in their order; none in a run that measures
        memory or warms up.

        Args:
            attention: what vLLM tells the attention layers of this step.

        Raises:
            RuntimeError: vLLM computes for a request that it has not told of.
        """

    def take_reports(self) -> dict[str, Tensor]:
        """How often each expert acted, no expert first, by the name that a request gave: of those
        that are finished and of those under way, since they were last taken.
        """
        for request in self.under_way():
            self.keep(request)
        taken = self.reports
        self.reports = {}
        return taken

    def keep(self, request: Request | None) -> None:
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
