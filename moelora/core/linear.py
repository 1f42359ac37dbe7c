"""What hangs on the base's modules: `MoeLoraLinear` expands, `Site` shrinks once for all,
`LayerRouting` routes.

Each adapted linear gets its `MoeLoraLinear` as a forward hook (a module, so that it copies and
pickles), which adds the experts' part to the linear's fresh output.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from moelora_kernels import Plan, expand, shrink
from torch import Tensor, nn

from .experts import Factor, rank_offsets

if TYPE_CHECKING:
    from ..config import MoeLoraConfig
    from .mixture import Mixture


class MoeLoraLinear(nn.Module):
    """The experts of one linear: its `lora_B` `[R, d_out]`, and the forward hook that adds them to
    its output.
    """

    site: Site

    def __init__(
        self,
        site: Site,
        index: int,
        ranks: tuple[int, ...],
        scaling: tuple[float, ...],
        out_features: int,
        **factory,
    ):
        super().__init__()
        # Past nn.Module.__setattr__: the site owns this module, not the other way round.
        object.__setattr__(self, "site", site)
        self.index = index
        self.rank_offsets = rank_offsets(ranks)
        self.scaling = scaling
        self.lora_B = Factor(ranks, range(len(ranks)), out_features, **factory)

    def forward(self, linear: nn.Module, args: tuple, output: Tensor) -> Tensor:
        """Forward hook: `output + Σ_e w_e s_e h_e B_e`, written into `output`, which nobody else
        has seen yet.
        """
        h, plan = self.site.rank_space(args[0], self.index)
        # Where a linear with a bias hands out a view, writing into it would cost the backward pass
        # a copy.
        inplace = not (torch.is_grad_enabled() and output._is_view())
        factor, offsets, scaling = self.lora_B.stacked(), self.rank_offsets, self.scaling
        return expand(h, factor, offsets, scaling, plan, output, inplace=inplace, checked=True)


class Site(nn.Module):
    """The adapted linears of one decoder layer that read one tensor: a stacked `lora_A` and one
    shrink for all.

    lora_A: `[Σ_l R_l, d_in]`, linear after linear, in each expert after expert.
    """

    mixture: Mixture

    def __init__(
        self,
        mixture: Mixture,
        names: list[str],
        layer: str | None,
        linears: list[tuple[int, int]],
        **factory,
    ):
        super().__init__()
        config = mixture.config
        object.__setattr__(self, "mixture", mixture)
        self.names = names
        self.layer = layer
        ranks = [config.ranks_of(name) for name in names]
        self.in_features = linears[0][0]
        self.rank_offsets = tuple(rank_offsets(own) for own in ranks)
        self.router_index = 0
        self.dropout = nn.Dropout(config.lora_dropout) if config.lora_dropout > 0 else None
        self.lora_A = Factor(
            [rank for own in ranks for rank in own],
            list(range(config.num_experts)) * len(linears),
            self.in_features,
            **factory,
        )
        self.lora_A.reset_kaiming()
        self.linears = nn.ModuleList(
            MoeLoraLinear(self, i, ranks[i], config.scaling_of(name), linears[i][1], **factory)
            for i, name in enumerate(names)
        )
        # A list, because assigning an attribute of a module is slow: [x, h of each linear, plan],
        # or empty.
        self._shrunk: list[Any] = []

    def rank_space(self, x: Tensor, index: int) -> tuple[Tensor, Plan]:
        """h of linear `index` and the plan; x `[…, d_in]` is routed and shrunk when the first
        linear asks.
        """
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

    def put_factors(self, config: MoeLoraConfig, lora_A: Factor, lora_Bs: Sequence[Factor]) -> None:
        """Put other factors in, for the experts of `config`."""
        ranks = [config.ranks_of(name) for name in self.names]
        self.rank_offsets = tuple(rank_offsets(own) for own in ranks)
        self.lora_A = lora_A
        for name, linear, own, lora_B in zip(self.names, self.linears, ranks, lora_Bs, strict=True):
            assert isinstance(linear, MoeLoraLinear)
            linear.rank_offsets, linear.scaling = rank_offsets(own), config.scaling_of(name)
            linear.lora_B = lora_B

    def forget(self) -> None:
        """Drop what a forward pass left behind where not every linear was called."""
        self._shrunk.clear()


class LayerRouting(nn.Module):
    """Forward pre-hook of a decoder layer: routes its input for all of the layer's (or the model's)
    sites.
    """

    mixture: Mixture

    def __init__(self, mixture: Mixture, router_index: int):
        super().__init__()
        object.__setattr__(self, "mixture", mixture)
        self.router_index = router_index

    def forward(self, layer: nn.Module, args: tuple, kwargs: dict) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        self.mixture.share(self.router_index, hidden)
