"""`MixtureContext`: what all parts of one mixture have in common."""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from torch import nn

from ..config import MoeLoraConfig
from ..routers import Router
from .choices import Choices
from .load_window import LoadWindow

if TYPE_CHECKING:
    # It imports the compiler, which takes a second.
    from .expert_tier import ExpertTier


@dataclass
class Entered:
    """A `use_experts` that was entered.

    Args:
        override: what it decides.
        key: by which the mixture, and copies of it that are made inside, know it.
        is_open: whether it has not been left; some leave in another order than they entered.
    """

    override: Any
    key: str = field(default_factory=lambda: uuid4().hex)
    is_open: bool = True


# What this thread or task has entered, innermost last. Two requests of a server do not see each
# other's.
ENTERED: ContextVar[tuple[Entered, ...]] = ContextVar("entered", default=())


class MixtureContext(nn.Module):
    """What sites, hooks and forward passes read of a mixture, by which a pass knows whose it is.

    Args:
        config: the mixture's configuration.

    Attributes:
        load: how many tokens each expert got; there once all routers are.
        choices: which experts act or are left out whatever the routers say; likewise.
        routers: the routers by what they route, a site's first linear or a decoder layer, with
            - for the dots of its name; the decoder layers own them.
        router_names: what they route, by its full name.
        tiles: the tuned tiles of this machine's GPU, by name; "" are the defaults.
        loss_scale: d(backward)/d(loss) where no loss passes through the model (see
            `MoeLoraCallback`); None: the model sees the scale by itself, or it is 1.
        counts_load: count who is chosen in training also where no router loss asks for it.
        mean_loss_scale: the same of a loop that does not tell the model num_items_in_batch, so that
            a micro-batch's router losses are a mean; None: `loss_scale` is right there too.
        loss_is_token_mean: the loop's loss is the negative mean of the tokens' log-probabilities.
        overrides_entered: the keys of its `use_experts` that are entered now, in any thread; of a
            copy those that it was made inside of.
        tiers: of the sites, in the order of the model, where their experts are offloaded.
        by_token: whether a routing has a row for each token, not for each sequence.
        reads_prompts: whether routers must be told which tokens are the prompt.
        routes_prompts: whether they do, and a routing has a row for each prompt.
        num_experts, is_linear (no φ), total_rank, fills_every_slot: as those three, kept at hand,
            since they are read for every site of every token that is generated, and a configuration
            answers slowly.
    """

    load: LoadWindow
    choices: Choices
    routers: nn.ModuleDict

    def __init__(self, config: MoeLoraConfig):
        super().__init__()
        self.config = config
        # Past nn.Module.__setattr__: the routers are submodules of their owners.
        object.__setattr__(self, "routers", nn.ModuleDict())
        self.router_names: list[str] = []
        self.router_list: tuple[Router, ...] = ()
        self._backend: str | None = None
        self.tiles = ""
        self.loss_scale: float | None = None
        self.counts_load = False
        self.mean_loss_scale: float | None = None
        self.loss_is_token_mean = False
        # A list, whose changes are atomic.
        self.overrides_entered: list[str] = []
        self.tiers: list[ExpertTier] = []
        self.num_experts = config.num_experts
        self.by_token = config.routes_tokens
        self.reads_prompts = config.reads_prompts
        self.routes_prompts = self.reads_prompts and not self.by_token
        self.is_linear = config.expert_activation is None
        self.total_rank = 0
        self.fills_every_slot = False

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Be a copy: a mixture of its own, overridden like the original that it is made of."""
        super().__setstate__(state)
        self.overrides_entered = [entered.key for entered in self.entered()]

    def entered(self) -> list[Entered]:
        """The `use_experts` of this mixture that this thread or task is in, innermost last."""
        keys = self.overrides_entered
        return [entered for entered in ENTERED.get() if entered.is_open and entered.key in keys]

    @property
    def resident_experts(self) -> int | None:
        """How many experts a site has at hand where the others are offloaded; None: all are."""
        return self.tiers[0].resident if self.tiers else None

    @property
    def drops_experts(self) -> bool:
        """Whether experts are left out of rows by chance: in training alone."""
        return self.training and self.choices.drops

    @property
    def backend(self) -> str | None:
        """The one of `moelora_kernels.BACKENDS` that computes, or None: its table chooses.

        This and `tiles` belong to the process, not to the model, and are not saved.
        """
        return self._backend

    @backend.setter
    def backend(self, name: str | None) -> None:
        """Set it here and in every router."""
        self._backend = name
        for router in self.router_list:
            router.backend = name

    def reads_context(self, width: int) -> bool:
        """Whether the routers read outside contexts of this width."""
        router = self.router_list[0]
        return router.reads == "context" and router.in_features == width

    @property
    def routers_have_parameters(self) -> bool:
        """Whether there is anything that the routers could learn."""
        return any(True for router in self.router_list for _ in router.parameters())

    def trained_router_parameter(self) -> nn.Parameter | None:
        """A trainable parameter of a router, or None where all are frozen."""
        parameters = (p for router in self.router_list for p in router.parameters())
        return next((p for p in parameters if p.requires_grad), None)
