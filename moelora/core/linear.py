"""What hangs on the base's modules: a `Site` shrinks once for its linears, and expands for each.

A place where experts are added is a linear, or a block of several modules (`blocks.py`).

A site lies in its decoder layer, and each part of it is called as a module: whatever brings the
layer's own weights to where they are needed (FSDP2, ZeRO-3, offload, device maps) brings its too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from moelora_kernels import Plan, expand, shrink
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.hooks import RemovableHandle

from ..config import MoeLoraConfig
from ..host_internals import GLOBAL_FORWARD_HOOKS, is_view
from ..routers import Router
from .context import MixtureContext
from .experts import Factor, LoraFactors
from .forward_pass import current_pass

if TYPE_CHECKING:
    # It imports the compiler, which takes a second.
    from .expert_tier import ExpertTier


class LoraA(Factor):
    """A site's stacked `lora_A` `[Σ_l R_l, d_in]`: linear after linear, expert after expert.

    Shared by the experts, `[Σ_l r_l, d_in]`: linear after linear.
    """

    def forward(self, x: Tensor, plan: Plan) -> tuple[Tensor, ...]:
        """h_l = x A_lᵀ for every linear l: x `[…, d_in]` → in the form of the plan's backend."""
        return shrink(x, self.stacked(), self.layout_on(x.device), plan, checked=True)


class LoraB(Factor):
    """The stacked `lora_B` `[R, d_out]` of one linear, with the scaling s_e of each expert."""

    def __init__(self, ranks: Sequence[int], scaling: Sequence[float], width: int, **factory):
        super().__init__([ranks], width, scaling, **factory)
        self.scaling = tuple(scaling)

    def forward(self, h: Tensor, plan: Plan, output: Tensor, inplace: bool) -> Tensor:
        """`output + Σ_e w_e s_e h_e B_e` `[…, d_out]`."""
        stacked = self.stacked()
        layout = self.layout_on(output.device)
        return expand(h, stacked, layout, plan, output, inplace=inplace, checked=True)


# φ, which acts between the halves: y += Σ_e w_e s_e φ(x A_eᵀ) B_e.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": functional.relu,
    "gelu": functional.gelu,
    "silu": functional.silu,
    "tanh": torch.tanh,
}


class Site(nn.Module):
    """The adapted linears (and blocks) of one decoder layer that read the same tensor.

    In series it is one of them, whose output is what is read.

    Args:
        context: of the mixture that it belongs to.
        names: the linears' full names in the base.
        layer: the path of their decoder layer, or None outside of any.
        features: the sizes (of what is read, d_out) of each linear.
        factory: device and dtype of the parameters.
    """

    lora_A: LoraA
    context: MixtureContext
    # Where experts are offloaded.
    tier: ExpertTier | None = None

    def __init__(
        self,
        context: MixtureContext,
        names: Sequence[str],
        layer: str | None,
        features: Sequence[tuple[int, int]],
        **factory,
    ):
        super().__init__()
        config = context.config
        # Past nn.Module.__setattr__: the mixture is not a part of its parts.
        object.__setattr__(self, "context", context)
        self.names = list(names)
        # Where it is in the model, which is also how its keys in a state dict begin.
        self.path = ""
        self.layer = layer
        self.in_features = features[0][0]
        self.activation = config.expert_activation
        self.is_series = config.expert_placement == "series"
        self.router_index = 0
        # Its own router, in scopes "site" and "projection".
        self.router: Router | None = None
        self.dropout = nn.Dropout(config.lora_dropout) if config.lora_dropout > 0 else None
        self.put(*self._zeros(config, [d_out for _, d_out in features], **factory))
        self.lora_A.reset_kaiming()

    def _zeros(
        self, config: MoeLoraConfig, out_features: Sequence[int], **factory
    ) -> tuple[LoraA, list[LoraB]]:
        """Factors for the experts of `config`, all zeros."""
        ranks = [config.ranks_of(name) for name in self.names]
        linears = zip(self.names, ranks, out_features, strict=True)
        lora_B = [LoraB(own, config.scaling_of(name), d, **factory) for name, own, d in linears]
        shared = config.share_lora_A
        return LoraA(ranks, self.in_features, shared=shared, **factory), lora_B

    def put(self, lora_A: LoraA, lora_B: Sequence[LoraB]) -> None:
        """Put these factors in."""
        self.lora_A = lora_A
        self.lora_B = nn.ModuleList(lora_B)
        for factor in self.factors():
            factor.stays = self.tier is not None

    def factors(self) -> list[Factor]:
        """`lora_A`, and the `lora_B` of every linear."""
        return [self.lora_A, *self.lora_B]  # type: ignore[list-item]

    def restacked(
        self, config: MoeLoraConfig, keep: Sequence[int | None], fresh: Mapping[str, LoraFactors]
    ) -> tuple[LoraA, list[LoraB]]:
        """Factors for the changed experts of `config`; this site stays as it is.

        Args:
            config: the configuration with the changed experts.
            keep: for each expert its number here, or None for the new one.
            fresh: the new expert's factors by the linear's name, where it is there.
        """
        like = self.lora_A.block(0, 0)
        widths = [factor.width for factor in self.factors()[1:]]
        lora_A, lora_B = self._zeros(config, widths, device=like.device, dtype=like.dtype)
        news = [fresh.get(name) for name in self.names]
        self.lora_A.carry(lora_A, keep, [None if new is None else new.A for new in news])
        for before, after, new in zip(self.factors()[1:], lora_B, news, strict=True):
            before.carry(after, keep, [None if new is None else new.B])
        return lora_A, lora_B

    def expert(self, expert: int, num_experts: int) -> dict[str, LoraFactors]:
        """An expert's factors by the linear's full name; rank 0 where it is not there."""
        factors = {}
        for i, (name, lora_B) in enumerate(zip(self.names, self.lora_B)):
            assert isinstance(lora_B, LoraB)
            A = self.lora_A.block(i, expert)
            factors[name] = LoraFactors(A, lora_B.block(0, expert), lora_B.scaling[expert])
        return factors

    def forward(self, x: Tensor, output: Tensor, index: int, inplace: bool) -> Tensor:
        """Linear number `index`'s output with its experts' part added.

        Args:
            x: what the linear read, `[…, d_in]`; in series what it gave.
            output: what it gave, `[…, d_out]`.
            index: the linear's number in this site.
            inplace: whether `output` may be written into.
        """
        running = current_pass(self.context)
        shrunk = running.shrunk.pop(self, None)
        if shrunk is None or not _is_same(shrunk[0], x) or index not in shrunk[1]:
            # The first linear that asks: x is routed, and shrunk for all of them.
            plan = running.plan_for(self.router_index, self.router, x)
            inputs = x if self.dropout is None else self.dropout(x)
            shrink_all = self.lora_A if self.tier is None else self.tier.shrink
            found: dict[int, Any] = dict(enumerate(shrink_all(inputs, plan)))
            shrunk = (x, found, plan)
        _, hs, plan = shrunk
        # Handed out once: the last linear lets go of everything, and a second call computes anew.
        h = hs.pop(index)
        if hs:
            running.shrunk[self] = shrunk
        if self.tier is not None:
            phi = ACTIVATIONS.get(self.activation or "")
            return self.tier.expand(h, index, output, inplace, phi)
        if self.activation is not None:
            # Before the gate, in the dtype of h: fp32, or that of the activations.
            h = ACTIVATIONS[self.activation](h)
        # Not self.lora_B[index], whose detour is felt at every token.
        return self._modules["lora_B"]._modules[str(index)](h, plan, output, inplace)  # type: ignore


def _is_same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are one: DeepSpeed gives each module an alias of its input."""
    return one is other or one.is_set_to(other)


class ExpertHook:
    """Forward hook of an adapted linear: its site adds the experts' part to its output."""

    handle: RemovableHandle

    def __init__(self, site: Site, index: int, linear: nn.Module):
        self.site = site
        self.index = index
        # Kept: a handle that is unpickled reserves its number, which else the hook of someone
        # else would get in another process, and take this one's place.
        self.handle = linear.register_forward_hook(self)

    def __call__(self, linear: nn.Module, args: tuple, output: Tensor) -> Tensor:
        # Another hook may have kept the output. Where a linear with a bias hands out a view,
        # writing into it would cost the backward pass a copy; in series that pass reads it.
        is_series = self.site.is_series
        inplace = False
        if not torch.compiler.is_compiling():
            alone = len(self.handle.hooks_dict_ref() or ()) == 1 and not GLOBAL_FORWARD_HOOKS
            inplace = alone and not (torch.is_grad_enabled() and (is_series or is_view(output)))
        return self.site(output if is_series else args[0], output, self.index, inplace)


class LayerRoutingHook:
    """Forward pre-hook of a decoder layer: routes its input for the layer's or model's sites."""

    handle: RemovableHandle

    def __init__(self, context: MixtureContext, router_index: int, layer: nn.Module):
        self.context = context
        self.router_index = router_index
        self.handle = layer.register_forward_pre_hook(self, with_kwargs=True)

    def __call__(self, layer: nn.Module, args: tuple, kwargs: dict) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        router = self.context.router_list[self.router_index]
        current_pass(self.context).share(self.router_index, router, hidden)
