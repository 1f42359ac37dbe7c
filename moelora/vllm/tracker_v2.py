"""Requests as vLLM's V2 runner tells of them: the model's state hears who comes and goes, and sees
each batch before it is computed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor
from vllm import SamplingParams
from vllm.config import VllmConfig
from vllm.v1.worker.gpu.sample.logits_processor import LogitsContext, LogitsProcessor

from .requests import Checks, Request, Requests, Rows


class ValidatorV2(Checks, LogitsProcessor):
    """A logits processor that leaves logits alone, since these are what vLLM asks whether it may
    take a request.
    """

    def add_request(self, req_idx: int, sampling_params: SamplingParams) -> bool:
        """No request's logits change.

        Args:
            req_idx: the request's place.
            sampling_params: its parameters.
        """
        return False

    def apply(self, logits: Tensor, ctx: LogitsContext) -> Tensor:
        """The same logits.

        Args:
            logits: `[rows, vocabulary]`.
            ctx: whose they are.
        """
        return logits


class TrackerV2(Requests):
    """The requests of an engine by their ids, and the batch that is computed next.

    Args:
        vllm_config: of the engine.
        read: what the parameters of a request decide; see `choices`.

    Attributes:
        batch: vLLM's `InputBatch` of this step; None where it has none.
    """

    def __init__(self, vllm_config: VllmConfig, read: Callable[[SamplingParams | None], Any]):
        super().__init__(vllm_config)
        self.read = read
        self.by_id: dict[str, Request] = {}
        self.batch: Any = None

    def add(self, new: Any) -> None:
        """A request comes, or comes back after it had to make room.

        Args:
            new: vLLM's `NewRequestData`.
        """
        if not _is_warm_up(new.req_id):
            choice = self.read(new.sampling_params)
            self.by_id[new.req_id] = Request(new.prompt_len, choice)

    def remove(self, req_id: str) -> None:
        """A request goes, for good or to make room.

        Args:
            req_id: its id.
        """
        self.keep(self.by_id.pop(req_id, None))

    def under_way(self) -> Iterable[Request]:
        """Those that came and did not go."""
        return self.by_id.values()

    def rows(self, attention: Any) -> list[Rows]:
        """See `Requests.rows`; all of it is on the host already.

        Args:
            attention: not read.
        """
        batch = self.batch
        names = [] if batch is None else batch.req_ids[: batch.num_reqs]
        known = [name for name in names if name in self.by_id]
        if not known:
            return []
        if len(known) < len(names):
            missing = next(name for name in names if name not in self.by_id)
            raise RuntimeError(
                f"vLLM computes tokens for request {missing!r} and told the model's state of no "
                "such request: this version of vLLM is not served."
            )
        starts = batch.query_start_loc_np.tolist()
        before = batch.num_computed_tokens_np.tolist()
        return [
            Rows(self.by_id[name], starts[i], starts[i + 1], before[i])
            for i, name in enumerate(names)
        ]


class MixtureState:
    """Before one of vLLM's model states: what that is told, a tracker hears as well.

    Attributes:
        read: as of `TrackerV2`.
    """

    read: Callable[[SamplingParams | None], Any]

    def __init__(self, vllm_config: VllmConfig, *more: Any):
        super().__init__(vllm_config, *more)  # type: ignore[call-arg]
        self.tracker = TrackerV2(vllm_config, type(self).read)

    def add_request(self, req_index: int, new_req_data: Any) -> None:
        """A request comes.

        Args:
            req_index: its place.
            new_req_data: what it is.
        """
        super().add_request(req_index, new_req_data)  # type: ignore[misc]
        self.tracker.add(new_req_data)

    def remove_request(self, req_id: str) -> None:
        """A request goes.

        Args:
            req_id: its id.
        """
        super().remove_request(req_id)  # type: ignore[misc]
        self.tracker.remove(req_id)

    def prepare_inputs(self, input_batch: Any, req_states: Any) -> dict[str, Any]:
        """The model's inputs besides the usual ones, as the state before gives them.

        Args:
            input_batch: what is computed next.
            req_states: the runner's.
        """
        self.tracker.batch = input_batch
        return super().prepare_inputs(input_batch, req_states)  # type: ignore[misc]

    def prepare_dummy_inputs(self, num_reqs: int, num_tokens: int) -> dict[str, Any]:
        """The same of a run that is nobody's.

        Args:
            num_reqs: of how many requests.
            num_tokens: of how many tokens.
        """
        self.tracker.batch = None
        return super().prepare_dummy_inputs(num_reqs, num_tokens)  # type: ignore[misc]


def state_class(own: type, read: Callable[[SamplingParams | None], Any]) -> type:
    """The model state of a mixture on a base whose own state is of the class `own`.

    Args:
        own: one of vLLM's model states.
        read: as of `TrackerV2`.
    """
    return type("MixtureState", (MixtureState, own), {"read": staticmethod(read)})


def _is_warm_up(req_id: str) -> bool:
    """Whether a request is one of vLLM's own, with which it tries its kernels; those of clients
    end in letters and digits.
    """
    return req_id.startswith("_") and req_id.endswith("_") and "warmup" in req_id
