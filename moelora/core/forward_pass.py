"""`ForwardPass`: one call of the model, from the routing of each input to the plan for the kernels.

It lives from the call of the model to the end of its backward pass: gradient checkpointing computes
a layer again with the forward pass that it belongs to. All that a pass needs and leaves behind is
here and not on the model, so threads, nested calls and errors do not meet.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from moelora_kernels import Plan, Shape, TopK, build_plan, can_decode, choose_backend, plan_decoding
from torch import Tensor, nn

from ..host_internals import inside_backward
from ..routers import PromptScores, Router, Routing, TopKRouter
from .context import MixtureContext
from .losses import RouterLosses
from .overrides import Override, entered_override, tokens_per_row
from .prompts import RequestPlans

MISSING_CONTEXT = (
    "router='context' reads router_context, which was not given: pass a tensor [batch, {width}] to "
    "forward or generate, or choose yourself by expert_weights."
)
MISSING_IDS = (
    "router={router!r} chooses by the ids of tokens, and this forward pass has inputs_embeds "
    "alone: pass input_ids, or use a router that reads hidden states."
)
PART_OF_PROMPT = (
    "An adapted linear reads {length} of the {whole} tokens of each sequence (logits_to_keep), and "
    "its router must read whole prompts: pass logits_to_keep=0, or leave the linear out of "
    "target_modules."
)


class RoutingDone(Exception):
    """Ends a forward pass of which nothing but the routing is wanted; `run_forward` catches it."""


class _Running(threading.local):
    """Each thread's innermost pass. Not a ContextVar, which torch.compile cannot read."""

    def __init__(self):
        # In each thread at its first look: what is only the class's torch.compile takes for absent.
        self.innermost: ForwardPass | None = None


_running = _Running()


def running_pass(context: MixtureContext) -> ForwardPass | None:
    """This thread's innermost forward pass through the mixture of `context`, or None."""
    running = _running.innermost
    while running is not None and running.context is not context:
        running = running.outer
    return running


def current_pass(context: MixtureContext) -> ForwardPass:
    """This thread's pass through the mixture; where a part is called alone, one of its own.

    Raises:
        RuntimeError: a backward pass computes a layer again and nobody kept the pass it belongs to.
    """
    running = running_pass(context)
    if running is not None:
        return running
    if inside_backward():
        raise RuntimeError(
            "A layer is computed again in the backward pass by a checkpointing that the mixture "
            "does not know of, so its router losses and sequence routing would be lost: use "
            "model.gradient_checkpointing_enable() (Trainer's gradient_checkpointing=True)."
        )
    return ForwardPass(context, 1, override=entered_override(context), is_part=True)


@dataclass
class ForwardPass:
    """One forward pass over `batch` sequences.

    Args:
        context: of the mixture that it goes through.
        batch: of the input.
        length: of the input in tokens, padding included; None where nobody knows.
        prompt_mask: `[batch, length]` bool, what a sequence router reads; None where it reads all.
        carried: one `Routing` a router, decided before: by an earlier step, or by the caller.
        plans: those of `carried` that the request's earlier steps have made.
        override: what the routers may not decide.
        token_ids: `[batch, length]`, for routers that read them.
        router_context: `[batch, n]`, for routers that read what is outside.
        known_prompts: what blending routers have made of the prompts in an earlier step, one a
            router, as logits `[batch, choices]`; or None.
        losses: the router losses of this pass, or None where nobody asks for them.
        keep_routings: keep each router's routing for the output.
        routing_only: the pass stops once the last router has routed, and its routings take
        gradients.
        is_part: not the model was called but a part of it, which knows of no batch and no prompt;
        only `use_experts` is known.
        routings: what each router decided, by its number.
        prompts: what each blending router makes of the prompts, `[batch, choices]`, by its number.
        kept: `carried`, or all of `routings`; by it a cache knows its plans again.
        shared: the plan of the layer's (or model's) router, for the sites that follow.
        shrunk: by site what it has computed for linears that have not asked yet: x, h of each,
        plan.
        read: by the name of a span what its first module read, until the last one has given.
        closed: the model has returned; whatever runs now recomputes.
        opener: what began it at the backbone, past the model's own forward; else None.
        outer: the pass that was running when this one began.
    """

    context: MixtureContext
    batch: int
    length: int | None = None
    prompt_mask: Tensor | None = None
    carried: tuple[Routing, ...] | None = None
    plans: RequestPlans | None = None
    override: Override | None = None
    token_ids: Tensor | None = None
    router_context: Tensor | None = None
    known_prompts: tuple[Routing, ...] | None = None
    losses: RouterLosses | None = None
    keep_routings: bool = False
    routing_only: bool = False
    is_part: bool = False

    routings: dict[int, Routing] = field(default_factory=dict)
    prompts: dict[int, Tensor] = field(default_factory=dict)
    kept: tuple[Routing, ...] | None = None
    shared: Plan | None = None
    shrunk: dict[nn.Module, tuple[Tensor, dict[int, Any], Plan]] = field(default_factory=dict)
    read: dict[str, Tensor] = field(default_factory=dict)
    closed: bool = False
    opener: object | None = None
    outer: ForwardPass | None = None

    @property
    def forced(self) -> bool:
        """Whether the routers are not asked at all."""
        return self.override is not None and self.override.expert_weights is not None

    def run(self, call: Callable[[], Any]) -> Any:
        """`call()` with this as the pass of the thread; afterwards the one before is that again."""
        self.begin()
        try:
            return call()
        finally:
            self.end()

    def begin(self) -> None:
        """Be the pass of this thread, until `end`."""
        self.outer = _running.innermost
        _running.innermost = self

    def end(self) -> None:
        """Let the pass before be that of the thread again."""
        _running.innermost = self.outer
        self.outer = None
        self.shrunk.clear()
        self.read.clear()

    def close(self) -> None:
        """The model has returned: let go of what held the graph."""
        self.closed = True
        self.shared = None

    def plan_for(self, index: int, router: Router | None, x: Tensor) -> Plan:
        """The plan of a site for its input x `[…, d_in]`: its own router's, or its layer's.

        Args:
            index: the number of the site's own router.
            router: that router, or None where the layer or the model has one.
            x: what the site reads.

        Raises:
            RuntimeError: the layer's or model's router has not run: a part of the model was called.
        """
        if router is not None:
            return self._decode_plan(index, router, x) or self.route(index, router, x)
        if self.override is not None and self.override.learns:
            # Where layers are checkpointed, weights that take gradients must come into each as its
            # own input.
            return self._plan(*self.override.routing(x, self.batch), x.dtype)
        if self.shared is None:
            raise RuntimeError(
                f"With router_scope={self.context.config.router_scope!r} a decoder layer's router "
                "runs before its linears: call the model itself, not one of its parts."
            )
        return self.shared

    def share(self, router_index: int, router: Router, hidden: Tensor) -> None:
        """Route `hidden` `[batch, length, d]` and keep the plan for the sites that follow."""
        self.shared = self.route(router_index, router, hidden)
        if self.routing_only and self.context.config.router_scope == "model":
            raise RoutingDone
        if self.context.config.router_scope == "model":
            # Before the first of the sites runs that compute with this plan.
            for tier in self.context.tiers:
                tier.prefetch(self.shared)

    def route(self, index: int, router: Router, x: Tensor) -> Plan:
        """Route x `[…, d]` with router number `index`, tie the router losses to it, and plan."""
        context = self.context
        carries_plans = self.plans is not None and not context.drops_experts
        if carries_plans and self.override is None and self.losses is None:
            return self._plan_of_request(index, router, x)
        routing, tokens_per_row = self._choose(index, router, x)
        if self.losses is not None:
            routing = self.losses.attach(index, routing, record=not self.closed)
        if self.keep_routings and not self.closed:
            detached = Routing(*(t.detach() for t in routing))
            self.routings[index] = routing if self.routing_only else detached
        return self._plan(routing, tokens_per_row, x.dtype)

    def _plan_of_request(self, index: int, router: Router, x: Tensor) -> Plan:
        """The plan of a routing that the request carries: of single tokens made once for all."""
        assert self.plans is not None
        single = x.shape[:-1].numel() == self.batch
        key = (index, x.dtype, x.device, self.context.backend)
        plan = self.plans.get(key) if single else None
        if plan is None:
            plan = self._plan(*self._choose(index, router, x), x.dtype)
            if single:
                plan = self.plans[key] = replace(plan, kept=True)
        return plan

    def kept_routings(self) -> tuple[Routing, ...]:
        """One `Routing` a router, in their order: after the pass, always the same tuple."""
        if self.kept is None:
            self.kept = self.carried or tuple(self.routings[i] for i in sorted(self.routings))
        return self.kept

    def kept_prompts(self) -> tuple[Routing, ...]:
        """What a cache keeps of the prompts, one a router: their routings, or what blending routers
        make of them, as logits without choices. Empty where no router has read.
        """
        if self.context.routes_prompts:
            return self.kept_routings()
        if self.known_prompts is not None:
            return self.known_prompts
        prompts = [self.prompts[index] for index in sorted(self.prompts)]
        return tuple(Routing(p, p.new_zeros(len(p), 0).long(), p[:, :0]) for p in prompts)

    def _choose(self, index: int, router: Router, x: Tensor) -> tuple[Routing, int]:
        """The routing of x and how many tokens each of its rows stands for."""
        override = self.override
        if override is not None and override.expert_weights is not None:
            return override.routing(x, self.batch)
        banned = self._not_to_choose(index, x.device)
        if self.carried is not None:
            routing = Routing(*(t.to(x.device) for t in self.carried[index]))
            each = tokens_per_row("expert_routing", len(routing.expert_ids), x, self.batch)
            return routing if banned is None else routing.without(banned), each
        load = self.context.load
        bias = load(index) if load.update_rate else None
        # Custom routers that know of no ban need not take one where there is none.
        choosing = (bias,) if banned is None else (bias, banned)
        if self.context.by_token and router.reads == "hidden_states" and not router.reads_prompt:
            return router(x.reshape(-1, x.shape[-1]), *choosing), 1
        length = self._length_of(x)
        if router.reads == "input_ids":
            return self._choose_by_ids(router, x, length, choosing)
        if router.reads == "context":
            if self.router_context is None:
                raise ValueError(MISSING_CONTEXT.format(width=router.in_features))
            return router(self.router_context.to(x.device), *choosing), length
        known = self.known_prompts
        if x.dim() == 3 and known is None and self.length not in (None, length):
            raise ValueError(PART_OF_PROMPT.format(length=length, whole=self.length))
        mask = self.prompt_mask
        mask = None if mask is None or mask.shape[1] != length else mask.to(x.device)
        rows = x.reshape(self.batch, length, -1)
        if not router.reads_prompt:
            return router(rows, *choosing, prompt_mask=mask), length
        prompt = PromptScores(mask, None if known is None else known[index].logits.to(x.device))
        routing = router(rows, *choosing, prompt=prompt)
        if not self.closed and prompt.logits is not None:
            self.prompts[index] = prompt.logits.detach()
        return routing, 1

    def _choose_by_ids(
        self, router: Router, x: Tensor, length: int, choosing: tuple[Tensor | None, ...]
    ) -> tuple[Routing, int]:
        """The routing of x, `length` rows a sequence, by a router that reads token ids."""
        name = self.context.config.router
        if self.token_ids is None:
            raise ValueError(MISSING_IDS.format(router=name))
        ids = self.token_ids.to(x.device)
        if not self.context.by_token:
            mask = None if self.prompt_mask is None else self.prompt_mask.to(x.device)
            return router(ids, *choosing, prompt_mask=mask), length
        if ids.shape[1] != length:
            raise ValueError(
                f"router={name!r} chooses by the ids of {tuple(ids.shape)} tokens, and an adapted "
                f"linear reads an input of shape {tuple(x.shape)}, which is not one row for each: "
                "leave that linear out of target_modules, or use routing_level='sequence'."
            )
        return router(ids.reshape(-1), *choosing), 1

    def _length_of(self, x: Tensor) -> int:
        """How many rows of x `[…, d]` belong to each sequence.

        Raises:
            RuntimeError: a part of the model was called, or x is not made of the sequences.
        """
        if self.is_part:
            config = self.context.config
            raise RuntimeError(
                f"router={config.router!r} at routing_level={config.routing_level!r} needs the "
                "tokens, prompts or contexts that only the whole model knows: call the model "
                "itself, not one of its parts."
            )
        num_tokens = x.shape[:-1].numel()
        if num_tokens % self.batch:
            raise RuntimeError(
                f"An input of shape {tuple(x.shape)} cannot be split into {self.batch} sequences."
            )
        return num_tokens // self.batch

    def _not_to_choose(self, index: int, device: torch.device) -> Tensor | None:
        """Which routed experts router `index` may not choose, `[num_routed]` bool: those that its
        layer does not have, and those that are banned.
        """
        choices = self.context.choices
        absent = choices.absent(index, device)
        if self.override is None or self.override.banned is None:
            return absent
        banned = self.override.banned.to(device)[: self.context.config.num_routed_experts]
        return banned if absent is None else banned | absent

    def _plan(self, routing: Routing, tokens_per_row: int, dtype: torch.dtype) -> Plan:
        """The plan of a routing, for activations of `dtype`."""
        context = self.context
        ids = routing.expert_ids
        weights = routing.expert_weights
        if not self.forced:
            # What is forced is exactly what was named.
            banned = None if self.override is None else self.override.banned
            ids, weights = context.choices.with_shared(ids, weights, banned)
            weights = context.choices.dropped(ids, weights) if context.drops_experts else weights
        if self.override is not None:
            complete = self.override.complete
        else:
            # A routing that was decided elsewhere may have empty slots, whatever this router does.
            complete = context.fills_every_slot and self.carried is None
        return build_plan(
            ids,
            weights,
            context.num_experts,
            total_rank=context.total_rank,
            tokens_per_row=tokens_per_row,
            complete=complete,
            backend=context.backend,
            dtype=dtype,
            tiles=context.tiles,
        )

    def _decode_plan(self, index: int, router: Router, x: Tensor) -> Plan | None:
        """The plan of a few tokens that the kernels route themselves; None where that cannot be."""
        context = self.context
        # The table has nothing but eager for it; asked at once, as it is for every token.
        is_eager = context.backend is None and x.device.type == "cpu"
        if is_eager or torch.is_grad_enabled() or not context.by_token or router.training:
            return None
        if self.keep_routings or self.override is not None or self.carried is not None:
            return None
        if type(router) is not TopKRouter or context.drops_experts:
            return None
        if context.tiers:
            # Who is chosen must be known before, to be there.
            return None
        if context.choices.num_shared or context.choices.lacks_some(index):
            # The kernels know of no expert that acts or is missing whatever is chosen.
            return None
        tokens = x.shape[:-1].numel()
        slots = router.num_experts_per_tok
        rank = context.total_rank
        shape = Shape(tokens, 1, router.num_choices, slots, rank, x.dtype, x.device.type)
        if (context.backend or choose_backend(shape)) != "triton" or not can_decode(shape):
            return None
        weight = router.get_parameter("weight")
        # An engine that keeps the weight elsewhere brings it to the router's own forward alone.
        is_here = weight.shape == (router.num_choices, router.in_features)
        is_here = is_here and weight.device == x.device
        if not is_here or torch.is_autocast_enabled(x.device.type):
            return None
        bias = context.load(index)
        flags = (router.norm_topk_prob, router.null_expert, router.input_norm)
        spec = TopK(weight.float(), bias, *flags)
        rows = x.reshape(tokens, x.shape[-1])
        linear = context.is_linear
        return plan_decoding(rows, spec, slots, rank, tiles=context.tiles, linear=linear)
