"""Putting a mixture into a model and taking it out again, in place."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..config import MoeLoraConfig
from ..core import gradient_checkpointing
from ..core.linear import ExpertHook, LayerRoutingHook, Site
from ..core.mixture import LayerExperts, Mixture
from ..core.model import MixtureModel, become, revert
from ..host_internals import hooks_of
from .sites import check_sites, device_of, find_sites
from .targets import decoder_layer, features, saved_modules

NAME = "moelora"


def put_into(
    model: PreTrainedModel,
    config: MoeLoraConfig,
    public: type[MixtureModel],
    then: Callable[[Any], None] | None = None,
) -> Any:
    """Make `model` one with a mixture, in place; all of it is undone if any of it fails.

    Args:
        model: the base.
        config: of the mixture; its `sites` are filled in.
        public: the class of ours that the model becomes an instance of.
        then: what else is done with it.
    """
    with undone_on_error(model):
        inject(model, config, public.is_classifier)
        mixed = become(model, public)
        if then is not None:
            then(mixed)
    return mixed


def inject(model: PreTrainedModel, config: MoeLoraConfig, is_classifier: bool = False) -> Mixture:
    """Put a mixture into `model`, in place: freeze it, make sites and routers, hook linears.

    Sites come from `config.sites` (a checkpoint) or from a probe forward, and are written there.

    Raises:
        ValueError: nothing to adapt, or a named module that cannot be adapted, with the reason.
    """
    if hasattr(model, NAME):
        raise ValueError(
            f"{type(model).__name__} holds a mixture already; take it out with unload() first."
        )
    mixture = Mixture(config)
    if config.sites is None:
        config.sites = find_sites(model, config, is_classifier, mixture.unadapted)
    else:
        check_sites(model, config.sites)
    mixture.trained_before = [n for n, p in model.named_parameters() if p.requires_grad]
    model.requires_grad_(False)
    for _, module in saved_modules(model, config, is_classifier):
        module.requires_grad_(True)
    _add_routers(model, mixture)
    for names in config.sites:
        _add_site(model, mixture, names)
    device = next(mixture.factors()).block(0).device
    mixture.finish(device)
    mixture.has_values = device.type != "meta"
    gradient_checkpointing.wrap(model, mixture.context)
    setattr(model, NAME, mixture)
    return mixture


def unload(model: MixtureModel) -> PreTrainedModel:
    """Take the mixture out, in place: the base is as it was, with its own class."""
    trained = set(model.moelora.trained_before)
    eject(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained)
    return revert(model)


def eject(model: nn.Module) -> None:
    """Take every part of a mixture out of `model`, in place."""
    gradient_checkpointing.unwrap(model)
    for module in model.modules():
        for hook in hooks_of(module):
            if isinstance(hook, (ExpertHook, LayerRoutingHook)):
                hook.handle.remove()
    for module in holders(model):
        delattr(module, NAME)


def holders(model: nn.Module) -> list[nn.Module]:
    """The modules of `model` that hold a part of a mixture: decoder layers and the model itself."""
    return [
        module
        for module in model.modules()
        if isinstance(getattr(module, NAME, None), (Mixture, LayerExperts))
    ]


@contextmanager
def undone_on_error(model: PreTrainedModel) -> Iterator[None]:
    """If what is done to `model` inside fails, give it back as it was."""
    cls = type(model)
    attributes = dict(model.__dict__)
    settings = dict(model.config.__dict__)
    trains = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    except BaseException:
        eject(model)
        model.__class__ = cls
        for owner, before in ((model, attributes), (model.config, settings)):
            owner.__dict__.clear()
            owner.__dict__.update(before)
        for parameter, trained in trains:
            parameter.requires_grad_(trained)
        raise


def _add_routers(model: PreTrainedModel, mixture: Mixture) -> None:
    """Make the routers of scopes "layer" and "model", and the hooks that run them."""
    config = mixture.config
    assert config.sites is not None
    if config.router_scope in ("site", "projection"):
        return
    layers = dict.fromkeys(decoder_layer(model, names[0]) for names in config.sites)
    if config.router_scope == "model":
        stack = next(layer for layer in layers if layer is not None).rpartition(".")[0]
        layers = {f"{stack}.{config.router_layer}": None}
    modules = dict(model.named_modules())
    for layer in layers:
        assert layer is not None
        if layer not in modules:
            raise ValueError(
                f"router_layer={config.router_layer} is not a decoder layer of this "
                f"{type(model).__name__}: {layer} does not exist. Choose a smaller number."
            )
        module = modules[layer]
        hidden = model.config.get_text_config().hidden_size
        experts = _place(model, mixture, layer)
        index = mixture.add_router(experts, layer, hidden, device=device_of(module))
        LayerRoutingHook(mixture.context, index, module)


def _add_site(model: PreTrainedModel, mixture: Mixture, names: list[str]) -> None:
    """Make the site of the linears `names`, its own router in some scopes, and the hooks."""
    linears = [model.get_submodule(name) for name in names]
    sizes = [features(linear) for linear in linears]
    weight = next(linears[0].parameters())
    # Masters in fp32 whatever the base's dtype: 16-bit AdamW loses small updates. float64 stays.
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    device = device_of(linears[0])
    layer = decoder_layer(model, names[0])
    site = Site(mixture.context, names, layer, sizes, device=device, dtype=dtype)  # type: ignore[arg-type]
    if mixture.config.router_scope in ("site", "projection"):
        site.router_index = mixture.add_router(site, names[0], site.in_features, device=device)
    # A module's name holds no dot.
    key = names[0].removeprefix(f"{layer}.").replace(".", "-")
    _place(model, mixture, layer).sites[key] = site
    where = f"{NAME}.outside" if layer is None else f"{layer}.{NAME}"
    site.path = f"{where}.sites.{key}"
    mixture.add_site(site)
    for index, linear in enumerate(linears):
        ExpertHook(site, index, linear)


def _place(model: PreTrainedModel, mixture: Mixture, layer: str | None) -> LayerExperts:
    """Where the experts of a decoder layer are; outside of any, in the mixture itself."""
    if layer is None:
        return mixture.outside
    module = model.get_submodule(layer)
    if not hasattr(module, NAME):
        setattr(module, NAME, LayerExperts())
    return getattr(module, NAME)
