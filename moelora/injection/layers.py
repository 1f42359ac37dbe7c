"""Where a mixture's parts stand in a model: beside the decoder layers that they act in."""

from __future__ import annotations

from torch import nn

from ..core.linear import Site
from ..core.mixture import LayerExperts, Mixture
from ..placement import ends_of, site_name
from .modules import decoder_layer

NAME = "moelora"


def layer_of(model: nn.Module, names: list[str]) -> str | None:
    """The decoder layer in which the site of the places `names` reads; None outside of any."""
    return decoder_layer(model, ends_of(names[0])[0])


def experts_of(model: nn.Module, mixture: Mixture, layer: str | None) -> LayerExperts:
    """Where the experts of a decoder layer are; outside of any, in the mixture itself."""
    if layer is None:
        return mixture.outside
    module = model.get_submodule(layer)
    if not hasattr(module, NAME):
        setattr(module, NAME, LayerExperts())
    return getattr(module, NAME)


def put_site(model: nn.Module, mixture: Mixture, site: Site, layer: str | None) -> None:
    """Make a site a part of its decoder layer, and known to the mixture."""
    # A module's name holds no dot.
    key = site_name(site.names[0]).removeprefix(f"{layer}.").replace(".", "-")
    experts_of(model, mixture, layer).sites[key] = site
    where = f"{NAME}.outside" if layer is None else f"{layer}.{NAME}"
    site.path = f"{where}.sites.{key}"
    mixture.sites[site.names[0]] = site


def routed_layers(model: nn.Module, mixture: Mixture, sites: list[list[str]]) -> list[str]:
    """The decoder layers whose input a router reads in scopes "layer" and "model".

    Raises:
        ValueError: there is no decoder layer of number `router_layer`.
    """
    config = mixture.config
    layers = list(dict.fromkeys(str(layer_of(model, names)) for names in sites))
    if config.router_scope == "layer":
        return layers
    chosen = f"{layers[0].rpartition('.')[0]}.{config.router_layer}"
    if chosen not in dict(model.named_modules()):
        raise ValueError(
            f"router_layer={config.router_layer} is not a decoder layer of this "
            f"{type(model).__name__}: {chosen} does not exist. Choose a smaller number."
        )
    return [chosen]
