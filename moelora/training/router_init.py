"""Routers that start good: from the experts' own weights (arrow), or from a few texts of each
(prototype).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..config import NO_EXPERT, MoeLoraConfig
from ..core.experts import Factor
from ..routers import ArrowRouter, DescriptorRouter, TopKRouter

ROUTER_INITS = ("random", "arrow", "prototype")
# What the covariance of the few tokens at hand is mixed with of a multiple of the identity.
SHRINKAGE = 0.2
MAX_TOKENS = 2048


def initialise(
    model: Any,
    how: str,
    texts: Mapping[str, Any] | None = None,
    tokenizer: Callable[..., Any] | None = None,
) -> None:
    """Set the rows of every router; all can be trained from there.

    random: as they are. arrow: the direction of input that an expert amplifies most, the top right
    singular vector of its s·BA over the linears of the site (arXiv:2405.11157); needs
    router="arrow", whose logits have no sign, and a router for each site or linear. prototype: the
    nearest mean hidden state, each expert's over its `texts` with itself at work, in the metric of
    the tokens' covariance (linear discriminant analysis); with router="descriptor" the experts'
    descriptors and a projection for them.
    texts: for every expert a list of strings, the path of a file (a text a line), rows with a
    "text", or tensors of token ids; strings need the tokenizer.

    Raises:
        ValueError: an unknown way, a router or scope that it does not fit, experts without texts.
    """
    if how not in ROUTER_INITS:
        raise ValueError(
            f"router_init={how!r} is unknown; expected one of: {', '.join(ROUTER_INITS)}."
        )
    if how != "prototype" and texts is not None:
        raise ValueError(f"texts are for router_init='prototype', not {how!r}: drop them.")
    if how == "random":
        return
    if how == "prototype" and _has_descriptors(model):
        describe(model, _texts_of_all(model, texts, tokenizer), fit=True)
        return
    routers = _routers(model, how)
    rows = _arrows(model) if how == "arrow" else _prototypes(model, routers, texts, tokenizer)
    with torch.no_grad():
        for name, router in routers.items():
            router.get_parameter("weight").copy_(rows[name])


def _routers(model: Any, how: str) -> dict[str, TopKRouter]:
    """The routers by their names in the mixture, if this way can set them."""
    config, found = model.moelora_config, {}
    if how == "arrow" and config.null_expert:
        raise ValueError(
            "router_init='arrow' has no direction for null_expert, which changes nothing: use 'prototype' with texts "
            f"of {NO_EXPERT!r} too."
        )
    if how == "arrow" and config.router_scope not in ("site", "projection"):
        raise ValueError(
            f"router_init='arrow' needs router_scope='site' or 'projection', not {config.router_scope!r}: its "
            "vectors lie in the inputs of linears, not of decoder layers. Use 'prototype'."
        )
    for name, router in model.moelora.routers.items():
        fits = isinstance(router, ArrowRouter) if how == "arrow" else type(router) is TopKRouter
        if not fits:
            wanted = "'arrow'" if how == "arrow" else "'top_k' (or the descriptors of 'descriptor')"
            raise ValueError(
                f"router_init={how!r} sets the rows of router={wanted}, not {config.router!r}."
            )
        found[name] = router
    return found


@torch.no_grad()
def _arrows(model: Any) -> dict[str, Tensor]:
    """For each site `[E, d_in]`: unit vectors, 0 for an expert that is not there.

    ΔW_l = s A_lᵀ B_l with B_lᵀ = Q R: the rows s R A_l of all linears together have ΔW's right
    singular vectors.
    """
    experts, found = model.moelora_config.num_experts, {}
    for name, site in model.moelora.sites.items():
        rows = torch.zeros(experts, site.in_features)
        for expert in range(experts):
            parts = []
            blocks = zip(site.linears, _blocks(site.lora_A, expert), strict=True)
            for linear, A in blocks:
                (B,) = _blocks(linear.lora_B, expert)
                r = torch.linalg.qr(B.T.float().cpu(), mode="r").R
                parts.append(linear.scaling[expert] * r @ A.float().cpu())
            product = torch.cat(parts)
            if product.numel() and bool(product.any()):
                rows[expert] = torch.linalg.svd(product, full_matrices=False).Vh[0]
        found[name] = rows
    return found


def _blocks(factor: Factor, expert: int) -> list[Tensor]:
    whole = factor.stacked()
    return [whole[rows] for rows in factor.expert_rows(expert)]


@torch.no_grad()
def _prototypes(
    model: Any, routers: Mapping[str, nn.Module], texts: Mapping[str, Any] | None, tokenizer: Any
) -> dict[str, Tensor]:
    ids = _texts_of_all(model, texts, tokenizer)
    seen = [router_inputs(model, name, list(routers), own) for name, own in ids.items()]
    return {router: discriminants([inputs[router] for inputs in seen]) for router in routers}


def _texts_of_all(
    model: Any, texts: Mapping[str, Any] | None, tokenizer: Any
) -> dict[str, list[Tensor]]:
    """The texts of every choice as token ids, in the choices' order."""
    names = model.moelora_config.choice_names
    given = texts or {}
    missing, unknown = sorted(set(names) - set(given)), sorted(set(given) - set(names))
    if missing or unknown:
        raise ValueError(
            f"router_init='prototype' needs texts of every expert: missing {missing}, unknown {unknown}. "
            f"The experts are: {', '.join(names)}."
        )
    return {name: token_ids(given[name], tokenizer, name) for name in names}


class ExpertDescriptions:
    """The part of a model with a mixture inside that says what its experts are for, with
    router="descriptor".
    """

    def describe_experts(
        self, texts: Mapping[str, Any], tokenizer: Callable[..., Any] | None = None
    ) -> None:
        """Set the descriptors of these experts from a few texts of each, in any form that
        `initialise` takes.

        The other experts' descriptors keep their bits. The first description also fits the
        projection to its texts: name all experts in it. Later ones leave the projection as it is,
        trained or not, so a newcomer (`add_expert`) is chosen from then on without training. With
        `null_expert` the choice of no expert may be described too, as "(base)".

        Raises:
            ValueError: another router, an unknown expert, no text, strings without a tokenizer.
        """
        config: MoeLoraConfig = self.moelora_config  # type: ignore[attr-defined]
        if not _has_descriptors(self):
            raise ValueError(
                f"describe_experts sets the descriptors of router='descriptor', and this mixture has "
                f"{config.router!r}: make one with MoeLoraConfig(router='descriptor')."
            )
        if self.moelora.forcing is not None:  # type: ignore[attr-defined]
            raise ValueError(
                "The experts cannot be described inside use_experts(): leave it first."
            )
        names = ", ".join(config.choice_names)
        if not texts:
            raise ValueError(f"There are no texts: give a few of one of {names} at least.")
        if unknown := sorted(set(texts) - set(config.choice_names)):
            raise ValueError(
                f"There is no expert {', '.join(map(repr, unknown))}. The experts are: {names}."
            )
        describe(self, {name: token_ids(own, tokenizer, name) for name, own in texts.items()})


def describe(model: Any, ids: Mapping[str, list[Tensor]], fit: bool | None = None) -> None:
    """Set the descriptors of these choices in every router from their texts' token ids; all are
    read first.
    """
    names, routers = model.moelora_config.choice_names, model.moelora.routers
    seen = {
        names.index(name): router_inputs(model, name, list(routers), own)
        for name, own in ids.items()
    }
    for name, router in routers.items():
        router.describe({choice: inputs[name] for choice, inputs in seen.items()}, fit)


def _has_descriptors(model: Any) -> bool:
    return all(isinstance(router, DescriptorRouter) for router in model.moelora.routers.values())


def router_inputs(
    model: Any, expert: str, routers: list[str], texts: list[Tensor]
) -> dict[str, Tensor]:
    """What each router would read of the expert's texts with the expert at work, `[tokens, d]`
    fp32.
    """
    found: dict[str, list[Tensor]] = {name: [] for name in routers}
    modules = {name.replace(".", "-"): module for name, module in model.named_modules()}

    def recorder(name: str) -> Callable[..., None]:
        def record(module: nn.Module, args: tuple, kwargs: dict) -> None:
            x = args[0] if args else kwargs["hidden_states"]
            x = x.detach().reshape(-1, x.shape[-1])
            router = model.moelora.routers[name]
            x = x if model.moelora.by_token else router.pool(x[None])
            found[name].append(router.normalised(x).cpu())

        return record

    # Before the mixture's own hooks: one of them may end the forward pass.
    handles = [
        modules[n].register_forward_pre_hook(recorder(n), prepend=True, with_kwargs=True)
        for n in routers
    ]
    training, names = model.training, model.moelora_config.expert_names
    model.eval()
    try:
        # For the choice of no expert: the base alone.
        with model.use_experts({names[0]: 0.0} if expert == NO_EXPERT else expert):
            for text in texts:
                model.routing_only(input_ids=text.to(model.device))
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()
    return {name: torch.cat(parts)[:MAX_TOKENS] for name, parts in found.items()}


def discriminants(classes: list[Tensor]) -> Tensor:
    """Rows W `[E, d]` such that x Wᵀ are the scores of linear discriminant analysis; classes:
    inputs `[n_e, d]`.

    score_e(x) = (x − (μ_e + μ) / 2)ᵀ Σ⁻¹ (μ_e − μ), with μ the mean of the class means. A router
    has no bias: the constant goes along Σ⁻¹μ, in which direction all inputs are nearly alike.
    """
    means = torch.stack([x.mean(0) for x in classes])
    centre = means.mean(0)
    spread = torch.cat([x - mean for x, mean in zip(classes, means, strict=True)])
    away = means - centre
    solved = _solve(spread, torch.cat([away, centre[None]]))
    rows, constant = solved[:-1], solved[-1]
    offsets = -0.5 * ((means + centre) * rows).sum(1)
    return rows + offsets[:, None] * constant / (centre @ constant).clamp(min=1e-12)


def _solve(spread: Tensor, values: Tensor) -> Tensor:
    """values Σ⁻¹ with Σ = (1 − λ) XᵀX / n + λ v I, X `[n, d]` the spread, v its mean variance.

    Woodbury: n tokens are fewer than d features of a large model, so the system that is solved is n
    × n.
    """
    n, variance = len(spread), float(spread.square().mean().clamp(min=1e-12))
    ridge, x = SHRINKAGE * variance, spread * ((1 - SHRINKAGE) / n) ** 0.5
    inner = torch.eye(n) * ridge + x @ x.T
    return (values - (torch.linalg.solve(inner, x @ values.T).T @ x)) / ridge


def token_ids(texts: Any, tokenizer: Any, name: str) -> list[Tensor]:
    """Texts in any of the forms of `initialise` as tensors of token ids `[1, n]`.

    Raises:
        ValueError: no text, a text without tokens, or strings without a tokenizer.
    """
    if isinstance(texts, (str, Path)):
        texts = [
            line for line in Path(texts).read_text(encoding="utf-8").splitlines() if line.strip()
        ]
    found = []
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
        found.append(ids)
    if not found:
        raise ValueError(
            f"There are no texts of {name!r}: give a few, or leave router_init='random'."
        )
    return found


def _rows(texts: Iterable[Any]) -> Iterable[Any]:
    for row in texts:
        yield row["text"] if isinstance(row, Mapping) else row
