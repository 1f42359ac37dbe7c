"""Routers that start good: by the experts' weights (arrow), or a few texts of each (prototype)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..core.blocks import read_by
from ..core.model import MixtureModel, evaluating
from ..placement import check_lora, ends_of
from ..routers import ROUTERS, ArrowRouter, DescriptorRouter, Router, TopKRouter
from ..routers.descriptor import class_means, times_covariance_power
from ..validation import check_choice, check_names
from .evaluation import alone, check_not_overridden

# How much of the discriminants' covariance is a multiple of the identity.
SHRINKAGE = 0.2
MAX_TOKENS = 2048


@torch.no_grad()
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
            at work, in the metric of the tokens' covariance (linear discriminant analysis). It sets
            the rows of routers whose scores are linear; with router="descriptor" the experts'
            descriptors and a projection for them.
        texts: for "prototype", texts of every expert ("(base)" too, with `null_expert`): a list of
            strings, the path of a file (a text a line), rows with a "text", or tensors of token
            ids.
        tokenizer: the base's, for texts that are strings.

    Raises:
        ValueError: an unknown way, a router or scope that it does not fit, experts without texts.
    """
    check_choice("router_init", how, ("random", "arrow", "prototype"))
    if how != "prototype" and texts is not None:
        raise ValueError(f"texts are for router_init='prototype', not {how!r}: drop them.")
    if how == "random":
        return
    _check_router(model, how)
    routers = model.moelora.router_list
    if how == "arrow":
        rows = _arrows(model)
    else:
        names = model.moelora_config.choice_names
        given = texts or {}
        missing = sorted(set(names) - set(given))
        unknown = sorted(set(given) - set(names))
        if missing or unknown:
            raise ValueError(
                f"router_init='prototype' needs texts of every expert: missing {missing}, unknown "
                f"{unknown}. The experts are: {', '.join(names)}."
            )
        inputs = _router_inputs(model, {name: given[name] for name in names}, tokenizer)
        if isinstance(routers[0], DescriptorRouter):
            return _describe(model, inputs, fit=True)
        rows = [discriminants(list(classes.values())) for classes in inputs]
    for router, own in zip(routers, rows, strict=True):
        router.get_parameter("weight").copy_(own)


@torch.no_grad()
def describe_experts(
    model: MixtureModel, texts: Mapping[str, Any], tokenizer: Callable[..., Any] | None = None
) -> None:
    """Set the descriptors of these experts; see `MoeLoraForCausalLM.describe_experts`.

    Later descriptions leave the projection as it is, trained or not.
    """
    names = model.moelora_config.choice_names
    if not isinstance(model.moelora.router_list[0], DescriptorRouter):
        raise ValueError(
            "describe_experts sets the descriptors of router='descriptor', and this mixture has "
            f"{model.moelora_config.router!r}: make one with MoeLoraConfig(router='descriptor')."
        )
    check_not_overridden(model)
    if not texts:
        raise ValueError(f"There are no texts: give a few of one of {', '.join(names)} at least.")
    check_names(texts, names, "experts")
    _describe(model, _router_inputs(model, texts, tokenizer))


def _check_router(model: MixtureModel, how: str) -> None:
    """Raise ValueError where this way cannot set the routers, which are all of one class."""
    config = model.moelora_config
    if how == "arrow":
        check_lora(config, "router_init='arrow'")
    router = model.moelora.router_list[0]
    problem = ""
    if how == "prototype" and not isinstance(router, DescriptorRouter):
        if type(router).score is not TopKRouter.score:
            fit = [name for name, cls in ROUTERS.items() if cls.score is TopKRouter.score]
            fit = ", ".join(sorted([*fit, "descriptor"]))
            problem = f"sets routers with linear scores ({fit}), not {config.router!r}"
    elif how == "arrow" and config.null_expert:
        problem = "has no direction for null_expert: use 'prototype'"
    elif how == "arrow" and config.router_scope not in ("site", "projection"):
        problem = f"needs router_scope='site' or 'projection', not {config.router_scope!r}"
    elif how == "arrow" and not isinstance(router, ArrowRouter):
        problem = f"sets the rows of router='arrow', not {config.router!r}"
    if problem:
        raise ValueError(f"router_init={how!r} {problem}.")


def _arrows(model: MixtureModel) -> list[Tensor]:
    """For each router `[E, d_in]`: unit vectors, 0 for an expert that is not there.

    ΔW_l = s A_lᵀ B_l with B_lᵀ = Q R: the rows s R A_l of all linears together have ΔW's right
    singular vectors.
    """
    mixture = model.moelora
    sites = sorted(mixture.sites.values(), key=lambda site: site.router_index)
    routed = mixture.config.num_routed_experts
    rows = [torch.zeros(routed, site.in_features) for site in sites]
    for expert in range(routed):
        factors = mixture.expert(expert)
        for site, own_rows in zip(sites, rows):
            products = []
            for own in (factors[linear] for linear in site.names):
                r = torch.linalg.qr(own.B.T.float().cpu(), mode="r").R
                products.append(own.scaling * r @ own.A.float().cpu())
            product = torch.cat(products)
            if product.numel() and bool(product.any()):
                own_rows[expert] = torch.linalg.svd(product, full_matrices=False).Vh[0]
    return rows


def _describe(
    model: MixtureModel, inputs: list[dict[int, Tensor]], fit: bool | None = None
) -> None:
    for router, own in zip(model.moelora.router_list, inputs, strict=True):
        assert isinstance(router, DescriptorRouter)
        router.describe(own, fit)


def _router_inputs(
    model: MixtureModel, texts: Mapping[str, Any], tokenizer: Callable[..., Any] | None
) -> list[dict[int, Tensor]]:
    """For each router, by a choice's number, what it would read of the choice's texts with it at
    work, `[tokens, d]` fp32.
    """
    context = model.moelora
    names = model.moelora_config.choice_names
    ids = {name: token_ids(own, tokenizer, name) for name, own in texts.items()}
    inputs: list[dict[int, Tensor]] = [{} for _ in context.router_list]
    read: list[list[Tensor]] = [[] for _ in context.router_list]
    with ExitStack() as stack:
        stack.enter_context(evaluating(model))
        for router, name, rows in zip(context.router_list, context.router_names, read):
            note = partial(_note, router, rows, context.by_token)
            # Before the mixture's own hooks: one of them may end the forward pass.
            module = model.get_submodule(ends_of(name)[0])
            if name in context.sites and context.sites[name].is_series:
                note = partial(_note_output, note)
                handle = module.register_forward_hook(note, prepend=True)
            else:
                handle = module.register_forward_pre_hook(note, prepend=True, with_kwargs=True)
            stack.enter_context(handle)
        for choice, own in ids.items():
            with model.use_experts(alone(model, choice)):
                for text in own:
                    model.routing_only(input_ids=text.to(model.device))
            for router_inputs, rows in zip(inputs, read):
                router_inputs[names.index(choice)] = torch.cat(rows)[:MAX_TOKENS]
                rows.clear()
    return inputs


def _note(
    router: Router, rows: list[Tensor], by_token: bool, module: nn.Module, args: tuple, kwargs: dict
) -> None:
    """A hook that adds to `rows` what the router reads of what a module or decoder layer reads."""
    x = read_by(args, kwargs)
    assert x is not None
    x = x.detach().reshape(-1, x.shape[-1])
    x = x if by_token else router.pool(x[None])
    rows.append(router.normalised(x).cpu())


def _note_output(note: Callable[..., None], module: nn.Module, args: tuple, output: Tensor) -> None:
    """A hook that hands to `note` what a module gave, which a router in series reads."""
    note(module, (output,), {})


def discriminants(classes: list[Tensor]) -> Tensor:
    """Rows W such that x Wᵀ are the scores of linear discriminant analysis.

    score_e(x) = (x − (μ_e + μ) / 2)ᵀ Σ⁻¹ (μ_e − μ), with μ the mean of the class means. A router
    has no bias: the constant goes along Σ⁻¹μ, in which direction all inputs are nearly alike.
    From each class's inputs `[n_e, d]` comes W `[E, d]`.
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
    """The texts of the choice `name`, in any of the forms of `initialise`, as ids `[1, n]` each."""
    if isinstance(texts, (str, Path)):
        lines = Path(texts).read_text(encoding="utf-8").splitlines()
        texts = [line for line in lines if line.strip()]
    rows = []
    for row in texts:
        text = row["text"] if isinstance(row, Mapping) else row
        if isinstance(text, str):
            if tokenizer is None:
                raise ValueError(f"The texts of {name!r} are strings: pass the base's tokenizer.")
            text = tokenizer(text)["input_ids"]
        rows.append(torch.as_tensor(text).reshape(1, -1))
        if not rows[-1].numel():
            raise ValueError(f"A text of {name!r} has no tokens: leave it out.")
    if not rows:
        raise ValueError(f"There are no texts of {name!r}: give a few.")
    return rows
