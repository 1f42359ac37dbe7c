"""The mixture inside a model: `Mixture` holds the sites and routers, routes, and plans.

The base's own modules stay as they are, with their names and weights; all parameters lie in one
submodule of the model, `moelora`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace

import torch
from moelora_kernels import (
    Plan,
    Shape,
    TopK,
    build_decode_plan,
    build_plan,
    can_decode,
    choose_backend,
)
from torch import Tensor, nn

from ..config import MoeLoraConfig
from ..routers import ROUTERS, Router, Routing, TopKRouter
from .experts import Factor, LoraFactors
from .forward_pass import ForwardState, RoutingDone
from .linear import Site
from .load import ExpertLoad
from .losses import attach_loss, expert_target_loss, load_balancing_loss, z_loss
from .overrides import Forcing


class Mixture(nn.Module):
    """All experts and routers of a model, and the state of the forward pass that is under way.

    sites: `Site`s by the name of their first linear; routers: `Router`s by what they route.
    backend: the one of `moelora_kernels.BACKENDS` that computes; None lets its table choose. tiles:
    the tuned tiles of this machine's GPU, by name. Both belong to the process, not to the model,
    and are not saved.
    """

    def __init__(self, config: MoeLoraConfig):
        super().__init__()
        self.config = config
        # Read for every site of every token that is generated; a PretrainedConfig answers slowly.
        self.num_experts = config.num_experts
        self.total_rank = 0
        self.by_token = config.routing_level == "token"
        self.own_routers = config.router_scope in ("site", "projection")
        self.sites = nn.ModuleDict()
        self.routers = nn.ModuleDict()
        self.load: ExpertLoad | None = None
        self.unadapted: dict[str, str] = {}
        self.state: ForwardState | None = None
        # What `use_experts` around the forward passes decides.
        self.forcing: Forcing | None = None
        self._router_list: tuple[Router, ...] = ()
        self._backend: str | None = None
        self.tiles = ""
        # d(backward)/d(loss) where no loss passes through the model; the Trainer callback keeps it
        # right.
        self.loss_scale: float | None = None

    @property
    def backend(self) -> str | None:
        """The backend that computes the experts and the routers, or None: the table's choice."""
        return self._backend

    @backend.setter
    def backend(self, name: str | None) -> None:
        """Set it here and in every router."""
        self._backend = name
        for router in self._router_list:
            router.backend = name

    def add_router(self, name: str, in_features: int, **factory) -> int:
        """Make the router called `name` and return its number."""
        router = ROUTERS[self.config.router](self.config, in_features)
        self.routers[name.replace(".", "-")] = router.to(**factory)
        return len(self.routers) - 1

    def finish(self, device: torch.device) -> None:
        """Make the expert load's buffers, once all routers are there."""
        self.load = ExpertLoad(self.config, len(self.routers), device)
        self.refresh()

    def refresh(self) -> None:
        """Read again what is kept at hand of the configuration, the sites and the routers."""
        self.num_experts = self.config.num_experts
        offsets = (own for site in self.sites.values() for own in site.rank_offsets)  # type: ignore[union-attr]
        self.total_rank = max(own[-1] for own in offsets)  # type: ignore[operator,union-attr]
        self.fills_every_slot = all(router.fills_every_slot for router in self.routers.values())
        self._router_list = tuple(self.routers.values())  # type: ignore[arg-type]

    @property
    def overridden(self) -> bool:
        """Whether this is inside `use_experts`."""
        return self.forcing is not None

    def router_weight(self) -> nn.Parameter | None:
        """A trainable parameter of a router, or None where all are frozen."""
        return next((p for p in self.routers.parameters() if p.requires_grad), None)

    @contextmanager
    def running(self, state: ForwardState) -> Iterator[ForwardState]:
        """Make `state` the one that hooks see; at the end forget what they left."""
        try:
            with self.resumed(state):
                yield state
        finally:
            for site in self.sites.values():
                site.forget()  # type: ignore[operator]

    @contextmanager
    def resumed(self, state: ForwardState) -> Iterator[None]:
        """Make `state` the one that hooks see, for a part of its forward pass or for recomputing
        that part.
        """
        before, self.state = self.state, state
        try:
            yield
        finally:
            self.state = before

    def expert(self, expert: int) -> dict[str, LoraFactors]:
        """Expert number `expert`'s factors by the linear's full name; rank 0 where it is not there."""
        factors = {}
        for site in self.sites.values():
            for i, (name, linear) in enumerate(zip(site.names, site.linears)):  # type: ignore[arg-type]
                A = site.lora_A.block(i * self.num_experts + expert)  # type: ignore[union-attr,operator]
                B = linear.lora_B.block(expert)  # type: ignore[union-attr,operator]
                factors[name] = LoraFactors(A, B, linear.scaling[expert])  # type: ignore[index]
        return factors

    @staticmethod
    def owns(key: str) -> bool:
        """Whether a state dict's key is the mixture's, not the base's."""
        return "moelora" in key.split(".")

    def merged(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """`state` as checkpoints hold it: trained and frozen rows of a factor as one tensor, expert
        after expert.
        """
        return dict(state)

    def factors(self) -> Iterator[Factor]:
        """Every stacked factor of the mixture."""
        return (module for module in self.modules() if isinstance(module, Factor))

    def plan_for(self, site: Site, x: Tensor) -> Plan:
        """The plan of `site` for its input x `[…, d_in]`: its own router's, or the one its layer
        shares.
        """
        if self.own_routers:
            return self._decode_plan(site, x) or self.route(site.router_index, x)[1]
        if self.state is None or self.state.shared is None:
            raise RuntimeError(
                f"{site.names[0]} ran before its router: with router_scope={self.config.router_scope!r} call the "
                "model itself, so that its decoder layers run in order."
            )
        forcing = self.state.forcing
        if forcing is not None and forcing.learns:
            # Where layers are checkpointed, weights that take gradients must come into each as its
            # own input.
            return self._plan(*forcing.routing(x, self.state.batch), x.dtype)
        return self.state.shared[1]

    def share(self, router_index: int, hidden: Tensor) -> None:
        """Route `hidden` and keep the plan for the sites that follow."""
        if self.state is None:
            raise RuntimeError(
                f"With router_scope={self.config.router_scope!r} call the model itself, not one of its parts."
            )
        self.state.shared = self.route(router_index, hidden)
        if self.state.routing_only and self.config.router_scope == "model":
            raise RoutingDone

    def route(self, router_index: int, x: Tensor) -> tuple[Routing, Plan]:
        """Route x `[…, d]` with router `router_index`, attach the router losses, record, and plan."""
        state = self.state
        routing, tokens_per_row = self._choose(router_index, x, state)
        if state is not None:
            if state.with_losses:
                routing = self._with_loss(router_index, routing, state)
            if state.keep_routings and not state.closed:
                kept = routing if state.routing_only else Routing(*(t.detach() for t in routing))
                state.routings[router_index] = kept
        return routing, self._plan(routing, tokens_per_row, x.dtype)

    def _plan(self, routing: Routing, tokens_per_row: int, dtype: torch.dtype) -> Plan:
        """The plan of a routing, for activations of `dtype`."""
        state = self.state
        forcing = self.forcing if state is None else state.forcing
        if forcing is None:
            # A routing that the caller hands over may have empty slots, whatever this router does.
            complete = self.fills_every_slot and (state is None or state.carried is None)
        else:
            complete = forcing.complete
        return build_plan(
            routing.expert_ids,
            routing.expert_weights,
            self.num_experts,
            total_rank=self.total_rank,
            tokens_per_row=tokens_per_row,
            complete=complete,
            backend=self.backend,
            dtype=dtype,
            tiles=self.tiles,
        )

    def _decode_plan(self, site: Site, x: Tensor) -> Plan | None:
        """The plan of a few tokens that the kernels route themselves, where nobody else asks for
        the routing.
        """
        router, state = self._router_list[site.router_index], self.state
        if (
            torch.is_grad_enabled()
            or not self.by_token
            or type(router) is not TopKRouter
            or router.training
        ):
            return None
        if router.input_norm or router.null_expert:
            return None
        if self.forcing is not None or (
            state is not None and (state.forcing or state.keep_routings)
        ):
            return None
        tokens, slots = x.shape[:-1].numel(), router.num_experts_per_tok
        shape = Shape(tokens, 1, self.num_experts, slots, self.total_rank, x.dtype, x.device.type)
        if (self.backend or choose_backend(shape)) != "triton" or not can_decode(shape):
            return None
        if torch.is_autocast_enabled(x.device.type):
            return None
        bias = self.load.selection_bias(site.router_index) if self.load is not None else None
        spec = TopK(router.get_parameter("weight").float(), bias, router.norm_topk_prob)
        return build_decode_plan(spec, tokens, slots, tiles=self.tiles)

    def with_weights(self, shared: tuple[Routing, Plan], weights: Tensor) -> tuple[Routing, Plan]:
        """`shared` with other plan weights: an explicit input of a checkpointed layer."""
        return shared[0], replace(shared[1], weights=weights)

    def _choose(self, index: int, x: Tensor, state: ForwardState | None) -> tuple[Routing, int]:
        """The routing of x and how many tokens each of its rows stands for."""
        router = self._router_list[index]
        num_tokens = x.shape[:-1].numel()
        forcing = self.forcing if state is None else state.forcing
        if forcing is not None and forcing.chooses:
            return forcing.routing(x, 1 if state is None else state.batch)
        # Custom routers that know of no ban need not take one where there is none.
        banned = () if forcing is None or forcing.banned is None else (forcing.banned.to(x.device),)
        bias = self.load.selection_bias(index) if self.load is not None else None
        if self.by_token:
            return router(x.reshape(num_tokens, -1), bias, *banned), 1
        if state is None:
            raise RuntimeError(
                "routing_level='sequence' routes by the prompt, which only the whole model knows: call the model "
                "itself, not one of its parts."
            )
        batch = state.batch
        if num_tokens % batch:
            raise RuntimeError(
                f"An input of shape {tuple(x.shape)} cannot be split into {batch} sequences."
            )
        if state.carried is not None:
            routing = Routing(*(t.to(x.device) for t in state.carried[index]))
            return routing.without(*banned) if banned else routing, num_tokens // batch
        mask, length = state.prompt_mask, num_tokens // batch
        mask = None if mask is None or mask.shape[1] != length else mask.to(x.device)
        pooled = router.pool(x.reshape(batch, length, -1), mask)
        return router(pooled, bias, *banned), length

    def _with_loss(self, index: int, routing: Routing, state: ForwardState) -> Routing:
        """Attach the router's losses to its weights and count its tokens."""
        config, load = self.config, self.load
        assert load is not None
        rows = routing.logits.shape[0]
        weights = state.row_weights(rows, routing.logits.device)
        counts = load.count(routing.expert_ids, weights)
        if not state.closed:
            state.counts[index] = counts
        own = config.router_aux_loss_window == "micro_batch"
        fractions = load.as_fractions(counts) if own else load.fractions(index)
        loss = config.router_aux_loss_coef * load_balancing_loss(routing.logits, fractions)
        loss = loss + config.router_z_loss_coef * z_loss(routing.logits)
        targets = state.targets_of(rows)
        if targets is not None:
            loss = loss + config.expert_target_loss_coef * expert_target_loss(
                routing.logits, targets
            )
        loss = (loss * weights).sum() / (state.denominator(weights) * len(self._router_list))
        if not state.closed:
            state.loss_values[index] = loss.detach()
        if not loss.requires_grad:
            return routing
        return routing._replace(expert_weights=attach_loss(routing.expert_weights, loss, state))
