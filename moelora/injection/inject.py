"""Putting a mixture into a model and taking it out again, in place."""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..config import MoeLoraConfig
from ..core import gradient_checkpointing
from ..core.blocks import BlockHook, SpanBegin, SpanEnd
from ..core.linear import ExpertHook, LayerRoutingHook, Site
from ..core.mixture import LayerExperts, Mixture
from ..core.model import MixtureModel, become, revert
from ..host_internals import hooks_of
from ..placement import ends_of
from .base import snapshot
from .blocks import Sizes, sizes_of
from .by_layer import write_out
from .layers import NAME, experts_of, layer_of, put_site, routed_layers
from .modules import depth_of, device_of, features, site_device
from .quantised import check_can_train, resume_packing, stop_packing
from .sites import find_sites, saved_modules

HOOKS = (ExpertHook, BlockHook, SpanBegin, SpanEnd, LayerRoutingHook)


def put_into(
    model: PreTrainedModel,
    config: MoeLoraConfig,
    public: type[MixtureModel],
    then: Callable[[Any], None] | None = None,
    has_rows: bool = True,
) -> Any:
    """Make `model` one of the class `public` with a mixture, in place, and do `then` with it; all
    of it is undone if any of it fails.

    has_rows: False leaves the experts' factors on the meta device, for `then` to bring their rows.
    """
    undo = snapshot(model)
    try:
        _inject(model, config, public.is_classifier, has_rows)
        mixed = become(model, public)
        if then is not None:
            then(mixed)
    except BaseException:
        undo()
        raise
    return mixed


def unload(model: MixtureModel) -> PreTrainedModel:
    """Take the mixture out, in place: the base is as it was, with its own class."""
    trained = set(model.moelora.trained_before)
    resume_packing(model, model.moelora.unpacked)
    gradient_checkpointing.wrap(model, None)
    for module in model.modules():
        for hook in hooks_of(module):
            if isinstance(hook, HOOKS):
                hook.handle.remove()
    take_out_parts(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained)
    return revert(model)


def take_out_parts(model: nn.Module) -> None:
    """Take what a mixture has in decoder layers and in `model` itself out of them; hooks stay."""
    for module in list(model.modules()):
        if isinstance(getattr(module, NAME, None), (Mixture, LayerExperts)):
            delattr(module, NAME)


def _inject(
    model: PreTrainedModel, config: MoeLoraConfig, is_classifier: bool, has_rows: bool
) -> None:
    """Freeze `model`, make sites and routers, hook linears and blocks.

    Sites come from `config.sites` (a checkpoint) or from a probe forward, and are written there;
    so are the sizes of blocks.
    """
    mixture = Mixture(config)
    mixture.unpacked = stop_packing(model)
    is_new = config.sites is None
    if config.sites is None:
        config.sites = find_sites(model, config, is_classifier, mixture.unadapted)
    sizes = sizes_of(model, config, chain.from_iterable(config.sites))
    write_out(model, config, is_new)
    mixture.trained_before = [n for n, p in model.named_parameters() if p.requires_grad]
    model.requires_grad_(False)
    for module in saved_modules(model, config, is_classifier):
        check_can_train(module)
        module.requires_grad_(True)
    if config.router_scope in ("layer", "model"):
        _add_shared_routers(model, mixture, config.sites)
    for names in config.sites:
        _add_site(model, mixture, {name: sizes[name] for name in names}, has_rows)
    device = site_device(model, config.sites[0])
    mixture.finish(device)
    mixture.has_values = device.type != "meta"
    gradient_checkpointing.wrap(model, mixture)
    setattr(model, NAME, mixture)


def _add_shared_routers(model: PreTrainedModel, mixture: Mixture, sites: list[list[str]]) -> None:
    """Make the routers of scopes "layer" and "model", and the hooks that run them."""
    hidden = model.config.get_text_config().hidden_size
    for layer in routed_layers(model, mixture, sites):
        module = model.get_submodule(layer)
        experts = experts_of(model, mixture, layer)
        depth = depth_of(model, layer)
        index = mixture.add_router(experts, layer, hidden, depth, device=device_of(module))
        LayerRoutingHook(mixture, index, module)


def _add_site(
    model: PreTrainedModel, mixture: Mixture, sizes: dict[str, Sizes], has_rows: bool
) -> None:
    """Make the site of the places that `sizes` names, its own router in some scopes, the hooks."""
    names = list(sizes)
    ends = [[model.get_submodule(end) for end in ends_of(name)] for name in names]
    weight = next(ends[0][1].parameters())
    # Masters in fp32 whatever the base's dtype: 16-bit AdamW loses small updates. float64 stays.
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    device = site_device(model, names)
    layer = layer_of(model, names)
    rows_on = device if has_rows else torch.device("meta")
    site = Site(mixture, names, layer, list(sizes.values()), device=rows_on, dtype=dtype)
    if mixture.config.router_scope in ("site", "projection"):
        depth = depth_of(model, layer)
        index = mixture.add_router(site, names[0], site.in_features, depth, device=device)
        site.router_index = index
    put_site(model, mixture, site, layer)
    for index, (first, last) in enumerate(ends):
        if first is not last:
            SpanBegin(site, index, first)
            SpanEnd(site, index, last)
        elif features(last) is None:
            BlockHook(site, index, last)
        else:
            ExpertHook(site, index, last)
