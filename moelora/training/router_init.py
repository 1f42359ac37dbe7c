"""Routers that start good: by the experts' weights (arrow), or a few texts of each (prototype)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..config import NO_EXPERT
from ..core.model import MixtureModel, evaluating
from ..routers import ArrowRouter, DescriptorRouter, TopKRouter
from ..routers.covariance import class_means, times_covariance_power
from ..validation import check_choice, check_names
from .arguments import check_not_overridden
from .evaluation import alone

ROUTER_INITS = ("random", "arrow", "prototype")
# How much of the discriminants' covariance is a multiple of the identity.
SHRINKAGE = 0.2
MAX_TOKENS = 2048


def initialise(
    model: MixtureModel,
    how: str,
    texts: Mapping[str, Any] | None = None,
    tokenizer: Callable[..., Any] | None = None,
) -> None:
    """Set the rows of every router; all can be trained from there.

    Args:
        model: the mixture.
        how: "random" leaves the routers as they are.
            "arrow": the direction of input that an expert amplifies most, the top right singular
            vector of its s·BA over the linears of the site (arXiv:2405.11157). It needs
            router="arrow", whose logits have no sign, and a router for each site or linear.
            "prototype": the nearest mean hidden state, each expert's over its `texts` with itself
            at work, in the metric of the tokens' covariance (linear discriminant analysis). With
            router="descriptor" it sets the experts' descriptors and a projection for them.
        texts: for "prototype", texts of every expert ("(base)" too, with `null_expert`): a list of
            strings, the path of a file (a text a line), rows with a "text", or tensors of token
            ids.
        tokenizer: the base's, for texts that are strings.

    Raises:
        ValueError: an unknown way, a router or scope that it does not fit, experts without texts.
    """
    check_choice("router_init", how, ROUTER_INITS)
    if how != "prototype" and texts is not None:
        raise ValueError(f"texts are for router_init='prototype', not {how!r}: drop them.")
    if how == "random":
        return
    if how == "prototype" and _has_descriptors(model):
        _describe(model, _texts_of_all(model, texts, tokenizer), fit=True)
        return
    routers = _routers(model, how)
    rows = _arrows(model) if how == "arrow" else _prototypes(model, texts, tokenizer)
    with torch.no_grad():
        for name, router in routers.items():
            router.get_parameter("weight").copy_(rows[name])


def describe_experts(
    model: MixtureModel, texts: Mapping[str, Any], tokenizer: Callable[..., Any] | None = None
) -> None:
    """Set the descriptors of these experts, with router="descriptor", from a few texts of each.

    The other experts' descriptors keep their bits. The first description also fits the projection
    to its texts: name all experts in it. Later ones leave the projection as it is, trained or not,
    so a newcomer (`add_expert`) is chosen from then on without training.

    Args:
        model: the mixture.
        texts: by expert a few texts, in any form that `initialise` takes. With `null_expert` of
            "(base)" too.
        tokenizer: the base's, for texts that are strings.

    Raises:
        ValueError: another router, an unknown expert, no text, strings without a tokenizer, or
            inside `use_experts`.
    """
    names = model.moelora_config.choice_names
    if not _has_descriptors(model):
        raise ValueError(
            "describe_experts sets the descriptors of router='descriptor', and this mixture has "
            f"{model.moelora_config.router!r}: make one with MoeLoraConfig(router='descriptor')."
        )
    check_not_overridden(model)
    if not texts:
        raise ValueError(f"There are no texts: give a few of one of {', '.join(names)} at least.")
    check_names(texts, names, "experts")
    _describe(model, {name: token_ids(own, tokenizer, name) for name, own in texts.items()})


def _routers(model: MixtureModel, how: str) -> dict[str, TopKRouter]:
    """The routers by their names in the mixture, if this way can set them."""
    config = model.moelora_config
    if how == "arrow" and config.null_expert:
        raise ValueError(
            "router_init='arrow' has no direction for null_expert, which changes nothing: use "
            f"'prototype' with texts of {NO_EXPERT!r} too."
        )
    if how == "arrow" and config.router_scope not in ("site", "projection"):
        raise ValueError(
            "router_init='arrow' needs router_scope='site' or 'projection', not "
            f"{config.router_scope!r}: its vectors lie in the inputs of linears, not of decoder "
            "layers. Use 'prototype'."
        )
    routers: dict[str, TopKRouter] = {}
    for name, router in model.moelora.named_routers().items():
        fits = isinstance(router, ArrowRouter) if how == "arrow" else type(router) is TopKRouter
        if not fits:
            wanted = "'arrow'" if how == "arrow" else "'top_k' (or the descriptors of 'descriptor')"
            raise ValueError(
                f"router_init={how!r} sets the rows of router={wanted}, not {config.router!r}."
            )
        assert isinstance(router, TopKRouter)
        routers[name] = router
    return routers


@torch.no_grad()
def _arrows(model: MixtureModel) -> dict[str, Tensor]:
    """For each router `[E, d_in]`: unit vectors, 0 for an expert that is not there.

    ΔW_l = s A_lᵀ B_l with B_lᵀ = Q R: the rows s R A_l of all linears together have ΔW's right
    singular vectors.
    """
    mixture = model.moelora
    names = list(mixture.routers)
    sites = {names[site.router_index]: site for site in mixture.site_list()}
    rows = {
        name: torch.zeros(mixture.num_experts, site.in_features) for name, site in sites.items()
    }
    for expert in range(mixture.num_experts):
        factors = mixture.expert(expert)
        for name, site in sites.items():
            products = []
            for own in (factors[linear] for linear in site.names):
                r = torch.linalg.qr(own.B.T.float().cpu(), mode="r").R
                products.append(own.scaling * r @ own.A.float().cpu())
            product = torch.cat(products)
            if product.numel() and bool(product.any()):
                rows[name][expert] = torch.linalg.svd(product, full_matrices=False).Vh[0]
    return rows


@torch.no_grad()
def _prototypes(
    model: MixtureModel, texts: Mapping[str, Any] | None, tokenizer: Any
) -> dict[str, Tensor]:
    ids = _texts_of_all(model, texts, tokenizer)
    inputs = [_router_inputs(model, name, own) for name, own in ids.items()]
    return {router: discriminants([own[router] for own in inputs]) for router in inputs[0]}


def _texts_of_all(
    model: MixtureModel, texts: Mapping[str, Any] | None, tokenizer: Any
) -> dict[str, list[Tensor]]:
    """The texts of every choice as token ids, in the choices' order."""
    names = model.moelora_config.choice_names
    given = texts or {}
    missing = sorted(set(names) - set(given))
    unknown = sorted(set(given) - set(names))
    if missing or unknown:
        raise ValueError(
            f"router_init='prototype' needs texts of every expert: missing {missing}, unknown "
            f"{unknown}. The experts are: {', '.join(names)}."
        )
    return {name: token_ids(given[name], tokenizer, name) for name in names}


def _describe(
    model: MixtureModel, ids: Mapping[str, list[Tensor]], fit: bool | None = None
) -> None:
    """Set the descriptors of these choices in every router; all texts are read before."""
    names = model.moelora_config.choice_names
    inputs = {names.index(name): _router_inputs(model, name, own) for name, own in ids.items()}
    for name, router in model.moelora.named_routers().items():
        assert isinstance(router, DescriptorRouter)
        router.describe({choice: own[name] for choice, own in inputs.items()}, fit)


def _has_descriptors(model: MixtureModel) -> bool:
    return all(isinstance(router, DescriptorRouter) for router in model.moelora.routers.values())


def _router_inputs(model: MixtureModel, choice: str, texts: list[Tensor]) -> dict[str, Tensor]:
    """What each router would read of the choice's texts with it at work, `[tokens, d]` fp32."""
    routers = model.moelora.named_routers()
    inputs: dict[str, list[Tensor]] = {name: [] for name in routers}
    modules = {name.replace(".", "-"): module for name, module in model.named_modules()}

    def recorder(name: str) -> Callable[..., None]:
        def record(module: nn.Module, args: tuple, kwargs: dict) -> None:
            x = args[0] if args else kwargs["hidden_states"]
            x = x.detach().reshape(-1, x.shape[-1])
            x = x if model.moelora.by_token else routers[name].pool(x[None])
            inputs[name].append(routers[name].normalised(x).cpu())

        return record

    # Before the mixture's own hooks: one of them may end the forward pass.
    handles = [
        modules[name.replace(".", "-")].register_forward_pre_hook(
            recorder(name), prepend=True, with_kwargs=True
        )
        for name in routers
    ]
    try:
        with evaluating(model), model.use_experts(alone(model, choice)):
            for text in texts:
                model.routing_only(input_ids=text.to(model.device))
    finally:
        for handle in handles:
            handle.remove()
    return {name: torch.cat(parts)[:MAX_TOKENS] for name, parts in inputs.items()}


def discriminants(classes: list[Tensor]) -> Tensor:
    """Rows W such that x Wᵀ are the scores of linear discriminant analysis.

    score_e(x) = (x − (μ_e + μ) / 2)ᵀ Σ⁻¹ (μ_e − μ), with μ the mean of the class means. A router
    has no bias: the constant goes along Σ⁻¹μ, in which direction all inputs are nearly alike.

    Args:
        classes: each class's inputs `[n_e, d]`.

    Returns:
        W `[E, d]`.
    """
    means, deviations = class_means(classes)
    centre = means.mean(0)
    directions = torch.cat([means - centre, centre[None]])
    solved = times_covariance_power(directions, deviations, -1.0, SHRINKAGE)
    rows = solved[:-1]
    constant = solved[-1]
    offsets = -0.5 * ((means + centre) * rows).sum(1)
    return rows + offsets[:, None] * constant / (centre @ constant).clamp(min=1e-12)


def token_ids(texts: Any, tokenizer: Any, name: str) -> list[Tensor]:
    """Texts in any of the forms of `initialise` as tensors of token ids `[1, n]`.

    Raises:
        ValueError: no text, a text without tokens, or strings without a tokenizer.
    """
    if isinstance(texts, (str, Path)):
        texts = [
            line for line in Path(texts).read_text(encoding="utf-8").splitlines() if line.strip()
        ]
    rows = []
    for text in _rows(texts):
        if isinstance(text, str):
            if tokenizer is None:
                raise ValueError(
                    f"The texts of {name!r} are strings: pass the base's tokenizer with them."
                )
            text = tokenizer(text)["input_ids"]
        ids = torch.as_tensor(text).reshape(1, -1)
        if not ids.numel():
            raise ValueError(f"A text of {name!r} has no tokens: leave it out.")
        rows.append(ids)
    if not rows:
        raise ValueError(
            f"There are no texts of {name!r}: give a few, or leave router_init='random'."
        )
    return rows


def _rows(texts: Iterable[Any]) -> Iterable[Any]:
    for row in texts:
        yield row["text"] if isinstance(row, Mapping) else row
