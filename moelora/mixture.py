"""The mixture inside a model: `Mixture` holds the sites and routers, `Site` shrinks once, `MoeLoraLinear` expands.

The base's own modules stay as they are, with their names and weights. Each adapted linear gets its
`MoeLoraLinear` as a forward hook (a module, so that it copies and pickles), which adds the experts' part to the
linear's fresh output; all parameters lie in one submodule of the model, `moelora`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from moelora_kernels import Plan, build_plan, expand, shrink
from torch import Tensor, nn

from .balance import ExpertLoad
from .config import MoeLoraConfig
from .experts import Factor, rank_offsets
from .losses import attach_loss, expert_target_loss, load_balancing_loss, z_loss
from .routers import ROUTERS, Router, Routing
from .state import ForwardState


class MoeLoraLinear(nn.Module):
    """The experts of one linear: its `lora_B` `[R, d_out]`, and the forward hook that adds them to its output."""

    site: Site

    def __init__(self, site: Site, index: int, out_features: int, **factory):
        super().__init__()
        ranks = site.ranks
        # Past nn.Module.__setattr__: the site owns this module, not the other way round.
        object.__setattr__(self, "site", site)
        self.index = index
        self.rank_offsets = rank_offsets(ranks)
        self.scaling = site.scaling
        self.lora_B = Factor(ranks, range(len(ranks)), out_features, **factory)

    def forward(self, linear: nn.Module, args: tuple, output: Tensor) -> Tensor:
        """Forward hook: `output + Σ_e w_e s_e h_e B_e`, written into `output`, which nobody else has seen yet."""
        h, plan = self.site.rank_space(args[0], self.index)
        # Where a linear with a bias hands out a view, writing into it would cost the backward pass a copy.
        inplace = not (torch.is_grad_enabled() and output._is_view())
        factor, offsets, scaling = self.lora_B.stacked(), self.rank_offsets, self.scaling
        return expand(h, factor, offsets, scaling, plan, output, inplace=inplace, checked=True)


class Site(nn.Module):
    """The adapted linears of one decoder layer that read one tensor: a stacked `lora_A` and one shrink for all.

    lora_A: `[L · R, d_in]`, linear after linear, in each expert after expert.
    """

    mixture: Mixture

    def __init__(
        self, mixture: Mixture, names: list[str], layer: str | None, linears: list[tuple[int, int]], **factory
    ):
        super().__init__()
        config = mixture.config
        object.__setattr__(self, "mixture", mixture)
        self.names = names
        self.layer = layer
        self.ranks = config.ranks
        self.scaling = config.scaling
        self.in_features = linears[0][0]
        self.rank_offsets = (rank_offsets(self.ranks),) * len(linears)
        self.router_index = 0
        self.dropout = nn.Dropout(config.lora_dropout) if config.lora_dropout > 0 else None
        self.lora_A = Factor(
            self.ranks * len(linears),
            list(range(len(self.ranks))) * len(linears),
            self.in_features,
            **factory,
        )
        self.lora_A.reset_kaiming()
        self.linears = nn.ModuleList(
            MoeLoraLinear(self, i, out_features, **factory) for i, (_, out_features) in enumerate(linears)
        )
        # A list, because assigning an attribute of a module is slow: [x, h of each linear, plan], or empty.
        self._shrunk: list[Any] = []

    def rank_space(self, x: Tensor, index: int) -> tuple[Tensor, Plan]:
        """h of linear `index` and the plan; x `[…, d_in]` is routed and shrunk when the first linear asks."""
        shrunk = self._shrunk
        if not shrunk or shrunk[0] is not x or shrunk[1][index] is None:
            plan = self.mixture.plan_for(self, x)
            inputs = x if self.dropout is None else self.dropout(x)
            hs = shrink(inputs, self.lora_A.stacked(), self.rank_offsets, plan, checked=True)
            shrunk[:] = (x, list(hs), plan)
        _, hs, plan = shrunk
        h = hs[index]
        # Handed out once: the last linear lets go of everything, and a second call computes anew.
        hs[index] = None
        if not any(other is not None for other in hs):
            shrunk.clear()
        return h, plan

    def forget(self) -> None:
        """Drop what a forward pass left behind where not every linear was called."""
        self._shrunk.clear()


class LayerRouting(nn.Module):
    """Forward pre-hook of a decoder layer: routes its input for all of the layer's (or the model's) sites."""

    mixture: Mixture

    def __init__(self, mixture: Mixture, router_index: int):
        super().__init__()
        object.__setattr__(self, "mixture", mixture)
        self.router_index = router_index

    def forward(self, layer: nn.Module, args: tuple, kwargs: dict) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        self.mixture.share(self.router_index, hidden)


class Mixture(nn.Module):
    """All experts and routers of a model, and the state of the forward pass that is under way.

    sites: `Site`s by the name of their first linear; routers: `Router`s by what they route.
    """

    def __init__(self, config: MoeLoraConfig):
        super().__init__()
        self.config = config
        # Read for every site of every token that is generated; a PretrainedConfig answers slowly.
        self.num_experts = config.num_experts
        self.total_rank = sum(config.ranks)
        self.by_token = config.routing_level == "token"
        self.own_routers = config.router_scope in ("site", "projection")
        self.sites = nn.ModuleDict()
        self.routers = nn.ModuleDict()
        self.load: ExpertLoad | None = None
        self.unadapted: dict[str, str] = {}
        self.state: ForwardState | None = None
        self.forced: Routing | None = None
        # d(backward)/d(loss) where no loss passes through the model; the Trainer callback keeps it right.
        self.loss_scale: float | None = None

    def add_router(self, name: str, in_features: int, **factory) -> int:
        """Make the router called `name` and return its number."""
        router = ROUTERS[self.config.router](self.config, in_features)
        self.routers[name.replace(".", "-")] = router.to(**factory)
        return len(self.routers) - 1

    def finish(self, device: torch.device) -> None:
        """Make the expert load's buffers, once all routers are there."""
        self.load = ExpertLoad(self.config, len(self.routers), device)
        self.fills_every_slot = all(router.fills_every_slot for router in self.routers.values())
        self._router_list: tuple[Router, ...] = tuple(self.routers.values())  # type: ignore[arg-type]

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
        """Make `state` the one that hooks see, for a part of its forward pass or for recomputing that part."""
        before, self.state = self.state, state
        try:
            yield
        finally:
            self.state = before

    def factors(self) -> Iterator[Factor]:
        """Every stacked factor of the mixture."""
        return (module for module in self.modules() if isinstance(module, Factor))

    def plan_for(self, site: Site, x: Tensor) -> Plan:
        """The plan of `site` for its input x `[…, d_in]`: its own router's, or the one its layer shares."""
        if self.own_routers:
            return self.route(site.router_index, x)[1]
        if self.state is None or self.state.shared is None:
            raise RuntimeError(
                f"{site.names[0]} ran before its router: with router_scope={self.config.router_scope!r} call the "
                "model itself, so that its decoder layers run in order."
            )
        return self.state.shared[1]

    def share(self, router_index: int, hidden: Tensor) -> None:
        """Route `hidden` and keep the plan for the sites that follow."""
        if self.state is None:
            raise RuntimeError(
                f"With router_scope={self.config.router_scope!r} call the model itself, not one of its parts."
            )
        self.state.shared = self.route(router_index, hidden)

    def route(self, router_index: int, x: Tensor) -> tuple[Routing, Plan]:
        """Route x `[…, d]` with router `router_index`, attach the router losses, record, and plan."""
        state = self.state
        routing, tokens_per_row = self._choose(router_index, x, state)
        if state is not None:
            if state.with_losses:
                routing = self._with_loss(router_index, routing, state)
            if state.keep_routings and not state.closed:
                state.routings[router_index] = Routing(*(t.detach() for t in routing))
        plan = build_plan(
            routing.expert_ids,
            routing.expert_weights,
            self.num_experts,
            total_rank=self.total_rank,
            tokens_per_row=tokens_per_row,
            # A routing that the caller hands over may have empty slots, whatever this router does.
            complete=self.fills_every_slot and (state is None or state.carried is None),
        )
        return routing, plan

    def with_weights(self, shared: tuple[Routing, Plan], weights: Tensor) -> tuple[Routing, Plan]:
        """`shared` with other plan weights: an explicit input of a checkpointed layer."""
        return shared[0], replace(shared[1], weights=weights)

    def _choose(self, index: int, x: Tensor, state: ForwardState | None) -> tuple[Routing, int]:
        """The routing of x and how many tokens each of its rows stands for."""
        router = self._router_list[index]
        num_tokens = x.shape[:-1].numel()
        forced = self.forced if state is None else state.forced
        if forced is not None:
            ids = forced.expert_ids.to(x.device).expand(num_tokens, -1)
            return Routing(
                x.new_zeros(num_tokens, 0), ids, forced.expert_weights.to(x.device).expand(num_tokens, -1)
            ), 1
        bias = self.load.selection_bias(index) if self.load is not None else None
        if self.by_token:
            return router(x.reshape(num_tokens, -1), bias), 1
        if state is None:
            raise RuntimeError(
                "routing_level='sequence' routes by the prompt, which only the whole model knows: call the model "
                "itself, not one of its parts."
            )
        batch = state.batch
        if num_tokens % batch:
            raise RuntimeError(f"An input of shape {tuple(x.shape)} cannot be split into {batch} sequences.")
        if state.carried is not None:
            routing = state.carried[index]
            return Routing(*(t.to(x.device) for t in routing)), num_tokens // batch
        return router(
            self._pooled(x.reshape(batch, num_tokens // batch, -1), state), bias
        ), num_tokens // batch

    @staticmethod
    def _pooled(x: Tensor, state: ForwardState) -> Tensor:
        """Mean of x `[B, S, d]` over the prompt, `[B, d]` fp32."""
        x = x.float() if x.dtype != torch.float64 else x
        mask = state.prompt_mask
        if mask is None or mask.shape[1] != x.shape[1]:
            return x.mean(1)
        mask = mask.to(device=x.device, dtype=x.dtype)
        return torch.einsum("bsd,bs->bd", x, mask) / mask.sum(1, keepdim=True).clamp(min=1)

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
            loss = loss + config.expert_target_loss_coef * expert_target_loss(routing.logits, targets)
        loss = (loss * weights).sum() / (state.denominator(weights) * len(self._router_list))
        if not state.closed:
            state.loss_values[index] = loss.detach()
        if not loss.requires_grad:
            return routing
        return routing._replace(expert_weights=attach_loss(routing.expert_weights, loss, state))
