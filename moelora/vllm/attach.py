"""Putting a mixture's sites and routers beside the linears that vLLM has built."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig

from ..core.linear import Site
from ..core.mixture import Mixture
from ..injection.layers import NAME, experts_of, layer_of, put_site, routed_layers
from ..injection.modules import depth_of
from .config import MoeLoraConfig
from .linears import Place, RouteLayer, WithExperts, find_place


@dataclass
class Attached:
    """A mixture inside of vLLM's model.

    Args:
        mixture: the sites and routers.
        places: by full name the place of each adapted linear.
        cuts: by its key in a checkpoint which columns of a factor this process has.
        callers: what must run in every forward pass, by key.
    """

    mixture: Mixture
    places: dict[str, Place] = field(default_factory=dict)
    cuts: dict[str, slice] = field(default_factory=dict)
    callers: dict[str, WithExperts | RouteLayer] = field(default_factory=dict)


def attach(base: nn.Module, config: MoeLoraConfig, vllm_config: VllmConfig) -> Attached:
    """Make the mixture of `config`, without values, beside the linears of `base`.

    Raises:
        ValueError: a linear that vLLM's model does not have, or has in another form.
    """
    attached = Attached(Mixture(config))
    mixture = attached.mixture
    modules = dict(base.named_modules())
    packed = dict(getattr(base, "packed_modules_mapping", None) or {})
    device = torch.device(vllm_config.device_config.device)
    order = torch.zeros(1, device=device)
    known = vllm_config.compilation_config.static_forward_context
    assert config.sites is not None
    for names in config.sites:
        for name in names:
            attached.places[name] = find_place(name, modules, packed)
    if config.router_scope in ("layer", "model"):
        _add_shared_routers(base, attached, order, device)
    for names in config.sites:
        # Masters are fp32; what serves has the model's dtype. Routers stay fp32.
        _add_site(base, attached, names, device, vllm_config.model_config.dtype)
    _wrap(attached, order)
    for key, caller in attached.callers.items():
        if known.setdefault(key, caller) is not caller:
            raise ValueError(f"vLLM has {key!r} among its layers already.")
    mixture.finish(device)
    mixture.requires_grad_(False).eval()
    return attached


def _add_shared_routers(
    base: nn.Module, attached: Attached, order: Tensor, device: torch.device
) -> None:
    """The routers of scopes "layer" and "model", and what runs them."""
    mixture = attached.mixture
    config = mixture.config
    for layer in routed_layers(base, mixture, config.sites or []):
        module = base.get_submodule(layer)
        names = tuple(inspect.signature(module.forward).parameters)
        if "hidden_states" not in names:
            raise ValueError(
                f"vLLM's {type(module).__name__} takes {', '.join(names)}, and none of these is "
                f"known as what router_scope={config.router_scope!r} reads: use "
                "router_scope='site' for this base."
            )
        hidden = config.get_text_config().hidden_size
        depth = depth_of(base, layer)
        index = mixture.add_router(experts_of(base, mixture, layer), layer, hidden, depth)
        _ready(mixture, index, device)
        key = f"{NAME}.route.{layer}"
        hook = RouteLayer(mixture, index, key, order, names)
        attached.callers[key] = hook
        module.register_forward_pre_hook(hook, with_kwargs=True)


def _add_site(
    base: nn.Module, attached: Attached, names: list[str], device: torch.device, dtype: torch.dtype
) -> None:
    """The site of some linears, and its own router in some scopes."""
    mixture = attached.mixture
    config = mixture.config
    places = [attached.places[name] for name in names]
    _check_alike(names, places)
    first = places[0].layer
    d_in = first.input_size_per_partition if places[0].is_split else first.input_size
    features = []
    for place in places:
        width = place.columns.stop - place.columns.start
        features.append((width if config.expert_placement == "series" else d_in, width))
    layer = layer_of(base, names)
    site = Site(mixture, names, layer, features, device=device, dtype=dtype)
    if config.router_scope in ("site", "projection"):
        whole = features[0][0] if config.expert_placement == "series" else first.input_size
        depth = depth_of(base, layer)
        site.router_index = mixture.add_router(site, names[0], whole, depth)
        _ready(mixture, site.router_index, device)
    site.requires_grad_(False)
    put_site(base, mixture, site, layer)
    attached.cuts[f"{site.path}.lora_A.weight"] = places[0].inputs
    for i, place in enumerate(places):
        attached.cuts[f"{site.path}.lora_B.{i}.weight"] = place.outputs


def _check_alike(names: list[str], places: list[Place]) -> None:
    """Raise ValueError where linears that read one tensor read other parts of it in vLLM."""
    if len({(place.is_split, place.layer.input_size) for place in places}) > 1:
        raise ValueError(
            f"{', '.join(names)} read one tensor, and vLLM cuts it for some of them: use "
            "tensor_parallel_size=1 for this base."
        )


def _wrap(attached: Attached, order: Tensor) -> None:
    """Put what adds the experts around the method of each linear of vLLM."""
    for site in attached.mixture.sites.values():
        for index, name in enumerate(site.names):
            place = attached.places[name]
            if site.is_series and getattr(place.layer, "skip_bias_add", False):
                raise ValueError(
                    f"vLLM adds the bias of {name} after the linear, and experts in series read "
                    "what has it: serve this mixture with transformers."
                )
            key = f"{NAME}.add.{place.where}"
            if key not in attached.callers:
                wrapped = WithExperts(place.layer.quant_method, key, order)  # type: ignore[arg-type]
                attached.callers[key] = wrapped
                place.layer.quant_method = wrapped
            attached.callers[key].parts.append((site, index, place.columns))  # type: ignore[union-attr]


def _ready(mixture: Mixture, index: int, device: torch.device) -> None:
    """Put a router where the model computes, in fp32."""
    router = mixture.routers[list(mixture.routers)[index]]
    router.to(device=device, dtype=torch.float32).requires_grad_(False).eval()
