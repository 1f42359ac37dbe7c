"""`Mixture`: the container of a model's sites and routers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import chain

import torch
from torch import Tensor, nn

from ..config import MoeLoraConfig
from ..routers import ROUTERS, Router
from .choices import Choices
from .context import MixtureContext
from .experts import FROZEN_EXPERTS, Factor, LoraFactors, is_sharded
from .linear import LoraA, LoraB, Site
from .load_window import LoadWindow
from .overrides import entered_override


class LayerExperts(nn.Module):
    """What a decoder layer has of a mixture: sites, and in scopes "layer" and "model" a router."""

    def __init__(self):
        super().__init__()
        self.sites = nn.ModuleDict()
        self.router: Router | None = None


class Mixture(MixtureContext):
    """All experts and routers of a model.

    The sites and routers themselves are submodules of their decoder layers; those of linears
    outside of any, and the expert load, are submodules of this one.

    Args:
        config: the mixture's configuration.

    Attributes:
        sites: the sites in the order of the model, by the name of their first linear.
        unadapted: the linears that a shorthand like "all-linear" met and could not adapt, and why.
    """

    def __init__(self, config: MoeLoraConfig):
        super().__init__(config)
        self.sites: dict[str, Site] = {}
        # Of each router: the site or layer that it is a submodule of.
        self.owners: list[Site | LayerExperts] = []
        self.outside = LayerExperts()
        self.unadapted: dict[str, str] = {}
        # What trained in the base before it was frozen, by name; `unload` gives that back.
        self.trained_before: list[str] = []
        # The base's linears that would pack their weights, by name; `unload` lets them again.
        self.unpacked: list[str] = []
        # False on the meta device, until values are drawn or loaded.
        self.has_values = True

    @property
    def overridden(self) -> bool:
        """Whether this thread is inside `use_experts`."""
        return entered_override(self) is not None

    def add_router(
        self, owner: Site | LayerExperts, name: str, in_features: int, depth: float, **factory
    ) -> int:
        """Make the router of what is called `name`, at this depth of the model (0 … 1), give it to
        its owner, and return its number.
        """
        router = ROUTERS[self.config.router](self.config, in_features).to(**factory)
        router.depth = depth
        owner.router = router
        self.owners.append(owner)
        self.routers[name.replace(".", "-")] = router
        self.router_names.append(name)
        return len(self.routers) - 1

    def finish(self, device: torch.device) -> None:
        """Make the load's buffers, once all routers are there."""
        self.load = LoadWindow(self.config, len(self.routers), device)
        self.refresh()

    def put(
        self,
        config: MoeLoraConfig,
        load: LoadWindow,
        routers: Sequence[Router],
        factors: Sequence[tuple[LoraA, list[LoraB]]],
    ) -> None:
        """Put in the parts of changed experts, all prepared before.

        Args:
            config: the configuration with the changed experts.
            load: their load.
            routers: a router for each there is, in their order.
            factors: for each site its lora_A and the lora_B of its linears.
        """
        for key, owner, router in zip(list(self.routers), self.owners, routers, strict=True):
            owner.router = router
            self.routers[key] = router
        for site, own in zip(self.sites.values(), factors, strict=True):
            site.put(*own)
        self.load = load
        self.config = config
        self.refresh()

    def refresh(self) -> None:
        """Read again what is kept at hand, after experts or routers changed."""
        totals = (site.lora_A.layout.totals for site in self.sites.values())
        self.num_experts = self.config.num_experts
        self.total_rank = max(chain.from_iterable(totals))
        self.router_list = tuple(self.routers.values())  # type: ignore[arg-type]
        self.choices = Choices(self.config, self.router_layers())
        self.choices.on(self.load.current.device)
        self.load.sizes = self.choices.sizes
        self.fills_every_slot = all(
            router.fills_every_slot and router.num_experts_per_tok <= size
            for router, size in zip(self.router_list, self.choices.sizes)
        )

    def router_layers(self) -> list[str | None]:
        """The decoder layer that each router belongs to, None outside of any."""
        owners = zip(self.owners, self.router_names, strict=True)
        return [own.layer if isinstance(own, Site) else name for own, name in owners]

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        # Before a first call, which may be one that a compiler or a CUDA graph records.
        self.choices.on(self.load.current.device)
        return self

    def check_resident(self, what: str) -> None:
        """Raise ValueError where experts or routers are not in this process's memory as a whole.

        Args:
            what: what cannot be done with them then.
        """
        if what == "train" and self.resident_experts is not None:
            raise ValueError(
                "This mixture cannot train while its experts are offloaded, which is for inference "
                "alone: call model.onload_experts() first (or model.eval() to compute a loss)."
            )
        # Of each site one parameter, since this is asked at every forward pass that trains.
        factors = [site.lora_A for site in self.sites.values()]
        parameters = [
            own.weight if own.frozen_weight is None else own.frozen_weight for own in factors
        ]
        if self.has_values and any(p is not None and p.is_meta for p in parameters):
            raise ValueError(
                f"This mixture cannot {what} while it is offloaded: its weights are elsewhere. "
                "Load it without offload, or take accelerate's hooks off "
                "(remove_hook_from_submodules)."
            )
        if what != "train" and any(p is not None and is_sharded(p) for p in parameters):
            raise ValueError(
                f"This mixture cannot {what} while it is sharded: each process has a part. "
                "Do it before it is sharded, or in one process with a saved checkpoint."
            )

    def factors(self) -> Iterator[Factor]:
        """Every stacked factor of the mixture."""
        return (factor for site in self.sites.values() for factor in site.factors())

    def linears(self) -> list[str]:
        """The full names of all adapted linears."""
        return [name for site in self.sites.values() for name in site.names]

    def expert(self, expert: int) -> dict[str, LoraFactors]:
        """Expert number `expert`'s factors by the linear's full name; rank 0 where it is absent."""
        self.check_resident("show or change single experts")
        factors: dict[str, LoraFactors] = {}
        for site in self.sites.values():
            factors |= site.expert(expert, self.num_experts)
        return factors

    @staticmethod
    def owns(key: str) -> bool:
        """Whether a state dict's key is the mixture's, not the base's."""
        return "moelora" in key.split(".")

    def merged(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A model's `state` as checkpoints hold it, whatever is frozen.

        The trained and the frozen rows of a factor are one tensor, expert after expert.
        """
        merged = dict(state)
        noted = getattr(state, "_metadata", {})
        for name, factor in self.named_factors():
            frozen = noted.get(name, {}).get(FROZEN_EXPERTS)
            factor.merged_state(merged, f"{name}.", frozen)
        return merged

    def named_factors(self) -> Iterator[tuple[str, Factor]]:
        """Every stacked factor, with how its keys in a model's state dict begin."""
        for site in self.sites.values():
            for name, part in site.named_modules():
                if isinstance(part, Factor):
                    yield f"{site.path}.{name}", part

    @torch.no_grad()
    def redraw(self) -> None:
        """Give every part the values of a new mixture; those made on the meta device have none."""
        for site in self.sites.values():
            site.lora_A.reset_kaiming()
            for lora_B in site.factors()[1:]:
                nn.init.zeros_(lora_B.get_parameter("weight"))
        for router in self.router_list:
            fresh = type(router)(self.config, router.in_features).state_dict()
            for name, tensor in router.state_dict().items():
                tensor.copy_(fresh[name])
        for counts in (self.load.current, self.load.previous, self.load.bias):
            counts.zero_()
        self.has_values = True
