"""`Step`: one forward pass of the engine, over rows of tokens that belong to many requests."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from moelora_kernels import Plan, build_plan
from torch import Tensor
from vllm.distributed import tensor_model_parallel_all_gather

from ..core.forward_pass import ForwardPass
from ..routers import PromptScores, Router, Routing
from .requests import Request, Rows, Slots


@dataclass
class Step(ForwardPass):
    """A forward pass whose rows `[T, d]` are the tokens of all requests of this step.

    Args:
        rows: whose rows they are, in order; rows after them are padding, without experts. None
            where that makes no difference: each token is routed by itself, and nobody has asked for
            anything.
    """

    rows: list[Rows] | None = None

    def plan_for(self, index: int, router: Router | None, x: Tensor) -> Plan:
        """The plan of a site for its input.

        Args:
            index: the number of the site's own router.
            router: that router, or None where the layer or the model has one.
            x: what the site reads, or this process's part of it.
        """
        if router is None:
            return super().plan_for(index, router, x)
        is_part = router.reads == "hidden_states" and x.shape[-1] < router.in_features
        if self.rows is None and not is_part:
            return super().plan_for(index, router, x)
        return self.route(index, router, tensor_model_parallel_all_gather(x) if is_part else x)

    def route(self, index: int, router: Router, x: Tensor) -> Plan:
        """The plan of all rows x by router number `index` and by what their requests decide.

        Args:
            index: the router's number.
            router: the router.
            x: what it reads, `[…, d]`.
        """
        if self.rows is None:
            return super().route(index, router, x)
        flat = x.reshape(-1, x.shape[-1])
        parts = [self._slots(rows, index, router, flat) for rows in self._joined(router)]
        ids, weights = _stacked(parts, flat)
        context = self.context
        return build_plan(
            ids,
            weights,
            context.num_experts,
            total_rank=context.total_rank,
            complete=False,
            backend=context.backend,
            dtype=x.dtype,
            tiles=context.tiles,
        )

    def _joined(self, router: Router) -> list[Rows]:
        """The requests' rows; neighbours that a router may read in one go are one."""
        joined: list[Rows] = []
        alike = self.context.by_token and not router.reads_prompt
        for rows in self.rows or ():
            plain = alike and rows.request.choice is None
            if plain and joined and joined[-1].request.choice is None:
                last = joined.pop()
                rows = Rows(last.request, last.start, rows.stop, 0)
            joined.append(rows)
        return joined

    def _slots(self, rows: Rows, index: int, router: Router, x: Tensor) -> Slots:
        """Which experts act on a request's rows; `[n, K]` each."""
        request = rows.request
        override = None if request.choice is None else request.choice.override
        count = rows.stop - rows.start
        if override is not None and override.expert_weights is not None:
            # What is forced is exactly what was named.
            ids = override.expert_ids.to(x.device).expand(count, -1)
            slots = Slots(ids, override.expert_weights.to(x.device).expand(count, -1))
        else:
            banned = None if override is None else override.banned
            routing = self._routed(rows, index, router, x, banned)
            ids, weights = self.context.choices.with_shared(
                routing.expert_ids, routing.expert_weights, banned
            )
            slots = Slots(ids.expand(count, -1), weights.expand(count, -1))
        if request.choice is not None and request.choice.report is not None:
            self._count(request, index, slots)
        return slots

    def _routed(
        self, rows: Rows, index: int, router: Router, x: Tensor, banned: Tensor | None
    ) -> Routing:
        """The routing of a request's rows, one row for all of them where it is the prompt's."""
        context = self.context
        request = rows.request
        absent = context.choices.absent(index, x.device)
        if banned is not None:
            banned = banned.to(x.device)[: context.config.num_routed_experts]
            absent = banned if absent is None else banned | absent
        bias = context.load(index) if context.load.update_rate else None
        choosing = (bias,) if absent is None else (bias, absent)
        if router.reads == "context":
            return router(request.choice.context[None].to(x.device), *choosing)
        source = self._ids() if router.reads == "input_ids" else x
        own = source[rows.start : rows.stop]
        if router.reads_prompt:
            return self._blended(rows, index, router, own, choosing)
        if context.by_token:
            return router(own, *choosing)
        known = request.slots.get(index)
        if known is None:
            prompt = own[: _prompt_length(rows)]
            routing = router(prompt[None], *choosing)
            request.slots[index] = Slots(routing.expert_ids, routing.expert_weights)
            return routing
        return Routing(known.weights[:, :0], known.ids, known.weights)

    def _blended(
        self, rows: Rows, index: int, router: Router, x: Tensor, choosing: tuple[Tensor | None, ...]
    ) -> Routing:
        """Each token's routing, blended with its prompt's."""
        known = rows.request.prompts.get(index)
        mask = None
        if known is None:
            mask = torch.arange(len(x), device=x.device)[None] < _prompt_length(rows)
        prompt = PromptScores(mask, known)
        routing = router(x[None], *choosing, prompt=prompt)
        if known is None and prompt.logits is not None:
            rows.request.prompts[index] = prompt.logits
        return routing

    def _ids(self) -> Tensor:
        assert self.token_ids is not None
        return self.token_ids.reshape(-1)

    def _count(self, request: Request, index: int, slots: Slots) -> None:
        """Count who acts on a request's rows: no expert first, then each."""
        chosen = torch.where(slots.weights != 0, slots.ids, -1).flatten()
        counts = torch.bincount(chosen + 1, minlength=self.context.num_experts + 1)
        before = request.counts.get(index)
        request.counts[index] = counts if before is None else before + counts


def _prompt_length(rows: Rows) -> int:
    """How many of the rows are the request's prompt.

    Raises:
        RuntimeError: they are not all of it.
    """
    length = rows.request.prompt_length
    if rows.before or rows.stop - rows.start < length:
        raise RuntimeError(
            f"A prompt of {length} tokens came in pieces ({rows.stop - rows.start} tokens after "
            f"{rows.before}), and routers that read prompts must see all of it: leave "
            "enable_chunked_prefill and enable_prefix_caching to the mixture."
        )
    return length


def _stacked(parts: list[Slots], x: Tensor) -> tuple[Tensor, Tensor]:
    """Slots for all rows x `[T, d]`, those that nobody has empty: two of `[T, K]`."""
    width = max((part.ids.shape[1] for part in parts), default=1)
    pad = torch.nn.functional.pad
    ids = [pad(part.ids, (0, width - part.ids.shape[1]), value=-1) for part in parts]
    weights = [pad(part.weights, (0, width - part.weights.shape[1])) for part in parts]
    left = len(x) - sum(map(len, ids))
    ids.append(torch.full((left, width), -1, dtype=torch.int64, device=x.device))
    weights.append(torch.zeros(left, width, device=x.device))
    return torch.cat(ids), torch.cat([own.float() for own in weights])
