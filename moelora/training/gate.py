"""Training the routers alone on expert labels: whose a prompt is; nothing else moves."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..core.losses import IGNORE
from ..core.model import MixtureModel, evaluating
from ..routers import Router
from ..validation import check_integer, check_names, check_number
from .arguments import check_not_overridden, check_texts
from .collator import PadRouting
from .datasets import Texts

# The lowest value of each integer option; None for numbers.
LOWEST = {"epochs": 1, "learning_rate": None, "batch_size": 1, "weight_decay": None, "seed": 0}


@dataclass(frozen=True)
class GateReport:
    """What `train_gate` did.

    Args:
        losses: the mean loss of each epoch.
        accuracy: the share of the last epoch's rows whose expert was the most probable choice.
        steps: of the optimizer.
        seconds: the time that it took.
    """

    losses: list[float]
    accuracy: float
    steps: int
    seconds: float


@dataclass
class _Epoch:
    """Sums over the steps of an epoch."""

    loss: float = 0.0
    right: int = 0
    rows: int = 0

    def add(self, loss: Tensor, right: int, rows: int) -> None:
        self.loss += float(loss.detach()) * rows
        self.right += right
        self.rows += rows


def train_gate(
    model: MixtureModel,
    texts: Mapping[str, Texts] | Texts,
    *,
    epochs: int = 10,
    learning_rate: float = 0.02,
    batch_size: int = 32,
    weight_decay: float = 0.0,
    seed: int = 0,
) -> GateReport:
    """Train all routers to choose each prompt's expert, and change nothing else, bit for bit.

    Each router's loss is the cross-entropy of its logits on the prompt: one row a prompt at
    sequence level, one a token at token level. AdamW, with a learning rate that falls to 0
    linearly. With router_scope="model" the forward pass ends at the router; what a sequence router
    reads there, if it pools by mean or last token, is computed once for all epochs.

    Args:
        model: the mixture.
        texts: by expert its texts ("(base)" too, with `null_expert`), or texts with expert_targets.
        epochs: how often every text is seen.
        learning_rate: of the first step.
        batch_size: prompts a step.
        weight_decay: of AdamW.
        seed: of the texts' order and of the routers' jitter noise.

    Raises:
        ValueError: no texts, unknown experts, texts without expert_targets, options out of range,
            or inside `use_experts`.
        TypeError: no Texts, or an option of another type.
    """
    check_options(
        epochs=epochs,
        learning_rate=learning_rate,
        batch_size=batch_size,
        weight_decay=weight_decay,
        seed=seed,
    )
    labelled = labelled_texts(model, texts)
    start = time.perf_counter()
    steps = epochs * -(-len(labelled) // batch_size)
    history = []
    with _routers_alone(model, seed) as parameters:
        optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=weight_decay)
        decay = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
        logits_and_targets = _batches(model, labelled, batch_size)
        generator = torch.Generator().manual_seed(seed)
        for _ in range(epochs):
            history.append(_Epoch())
            for numbers in torch.randperm(len(labelled), generator=generator).split(batch_size):
                loss, right, rows = _loss(logits_and_targets(numbers.tolist()))
                gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
                for parameter, gradient in zip(parameters, gradients):
                    parameter.grad = gradient
                optimizer.step()
                decay.step()
                history[-1].add(loss, right, rows)
    losses = [epoch.loss / max(epoch.rows, 1) for epoch in history]
    accuracy = history[-1].right / max(history[-1].rows, 1)
    return GateReport(losses, accuracy, steps, time.perf_counter() - start)


def check_options(**options: Any) -> None:
    """Raise where `train_gate` would refuse these options, for recipes that come to it late.

    Raises:
        ValueError, TypeError: an option that does not exist, or out of range.
    """
    if unknown := sorted(set(options) - set(LOWEST)):
        raise ValueError(
            f"train_gate has no option {unknown}. Its options are: {', '.join(LOWEST)}."
        )
    for name, value in options.items():
        lowest = LOWEST[name]
        if lowest is not None:
            check_integer(name, value, lowest)
        else:
            check_number(name, value, 0.0, float("inf"), open_low=name == "learning_rate")


@torch.no_grad()
def prompt_features(model: MixtureModel, texts: Texts, batch_size: int = 32) -> Tensor:
    """What the model's first router reads of each prompt, `[n, d]` fp32 on the CPU.

    At token level it is the mean over the prompt's tokens.

    Args:
        model: the mixture.
        texts: the prompts' texts.
        batch_size: prompts a forward pass.

    Raises:
        ValueError: no texts, or inside `use_experts`, where no router reads.
    """
    check_not_overridden(model)
    if not len(texts):
        raise ValueError("There are no texts to take features of: give one at least.")
    router = model.moelora.context.router_list[0]
    features = []
    with evaluating(model):
        for begin in range(0, len(texts), batch_size):
            rows = [{"input_ids": prompt} for prompt in texts.prompts()[begin : begin + batch_size]]
            features.append(_read(model, router, _padded(model, rows)).float().cpu())
    return torch.cat(features)


def labelled_texts(model: MixtureModel, texts: Mapping[str, Texts] | Texts) -> Texts:
    """All texts with expert_targets, of which at least one must count.

    Raises:
        ValueError, TypeError: as `train_gate`.
    """
    check_not_overridden(model)
    names = model.moelora_config.choice_names
    if isinstance(texts, Mapping):
        check_names(texts, names)
        for name, own in texts.items():
            check_texts(repr(name), own)
        texts = Texts.joined([own.labelled(names.index(name)) for name, own in texts.items()])
    check_texts("texts", texts)
    if not len(texts):
        raise ValueError(f"There are no texts: give some of each of {', '.join(names)}.")
    for number, row in enumerate(texts.rows):
        if "expert_targets" not in row:
            raise ValueError(
                f"Row {number} has no expert_targets: give texts by expert, or Texts.labelled(…)."
            )
        targets = row["expert_targets"]
        if bool(((targets != IGNORE) & ((targets < 0) | (targets >= len(names)))).any()):
            raise ValueError(
                f"Row {number} has expert_targets {targets.tolist()}; expected 0 … "
                f"{len(names) - 1} or −100."
            )
    if all(bool((row["expert_targets"] == IGNORE).all()) for row in texts.rows):
        raise ValueError("There are no expert_targets that count: all are −100.")
    return texts


@contextmanager
def _routers_alone(model: MixtureModel, seed: int) -> Iterator[list[nn.Parameter]]:
    """The routers' parameters, which train inside; afterwards only their values have changed."""
    routers = list(model.moelora.routers.values())
    parameters = [parameter for router in routers for parameter in router.parameters()]
    before = [(parameter, parameter.requires_grad, parameter.grad) for parameter in parameters]
    try:
        # The routers' jitter noise draws from the global generators.
        with evaluating(model), torch.random.fork_rng():
            torch.manual_seed(seed)
            for router in routers:
                router.train()
            for parameter in parameters:
                parameter.requires_grad_(True)
            yield parameters
    finally:
        for parameter, takes_gradient, gradient in before:
            parameter.requires_grad_(takes_gradient)
            parameter.grad = gradient


def _batches(
    model: MixtureModel, texts: Texts, batch_size: int
) -> Callable[[list[int]], list[tuple[Tensor, Tensor]]]:
    """A function from rows' numbers to each router's logits `[N, choices]` and targets `[N]`."""
    config = model.moelora_config
    sequences = config.routing_level == "sequence"
    rows = [
        {"input_ids": prompt, "expert_targets": _targets(row, len(prompt), sequences)}
        for row, prompt in zip(texts.rows, texts.prompts())
    ]
    if sequences and config.router_scope == "model" and config.router_pooling != "attention":
        (router,) = model.moelora.routers.values()
        features = prompt_features(model, texts, batch_size).to(model.device)
        labels = torch.stack([row["expert_targets"] for row in rows]).to(model.device)
        return lambda numbers: [(router(features[numbers]).logits, labels[numbers])]

    def run(numbers: list[int]) -> list[tuple[Tensor, Tensor]]:
        batch = _padded(model, [rows[i] for i in numbers])
        targets = batch.pop("expert_targets").reshape(-1)
        return [
            (routing.logits, targets.to(routing.logits.device))
            for routing in model.routing_only(**batch)
        ]

    return run


def _targets(row: dict[str, Tensor], length: int, sequences: bool) -> Tensor:
    """The target of a prompt of `length` tokens: 0-dim at sequence level, else `[length]`."""
    targets = row["expert_targets"]
    if targets.dim() == 0:
        return targets if sequences else targets.expand(length)
    if sequences:
        raise ValueError(
            "routing_level='sequence' has one choice a text, so expert_targets is one number each."
        )
    return targets[row["router_mask"]] if "router_mask" in row else targets


def _loss(pairs: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, int, int]:
    """The mean over routers of the cross-entropy; how many rows of all were right; all rows."""
    losses = []
    right = 0
    rows = 0
    for logits, targets in pairs:
        there = targets != IGNORE
        count = int(there.sum())
        loss = 0 * logits.sum()
        if count:
            loss = nn.functional.cross_entropy(logits[there], targets[there])
        losses.append(loss)
        right += int((logits.argmax(-1) == targets)[there].sum())
        rows += count
    return torch.stack([loss.to(losses[0].device) for loss in losses]).mean(), right, rows


def _padded(model: MixtureModel, rows: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Prompts as one batch on the model's device, padded on the right."""
    return {name: tensor.to(model.device) for name, tensor in PadRouting()(rows).items()}


def _read(model: MixtureModel, router: Router, batch: dict[str, Tensor]) -> Tensor:
    """What `router` reads of a batch of prompts, `[batch, d]`."""
    rows: list[Tensor] = []

    def read(module: nn.Module, args: tuple, kwargs: dict) -> None:
        x = args[0]
        x = router.pool(x, kwargs.get("prompt_mask")) if x.dim() == 3 else x
        rows.append(router.normalised(x))

    handle = router.register_forward_pre_hook(read, with_kwargs=True)
    try:
        model.routing_only(**batch)
    finally:
        handle.remove()
    (x,) = rows
    mask = batch["attention_mask"]
    if len(x) == len(mask):
        return x
    x = x.view(*mask.shape, -1)
    mask = mask.to(x)
    return (x * mask.unsqueeze(-1)).sum(1) / mask.sum(1, keepdim=True)
