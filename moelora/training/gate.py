"""Training the routers alone on expert labels: cross-entropy of what they choose for a prompt,
nothing else moves.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from ..core.losses import IGNORE
from ..validation import check_integer, check_number
from .datasets import Texts

Batch = tuple[dict[str, Tensor], Tensor]


@dataclass(frozen=True)
class GateReport:
    """What `train_gate` did: the mean loss of each epoch, and the share of the last one's rows
    chosen right.
    """

    losses: list[float]
    accuracy: float
    steps: int
    seconds: float


def train_gate(
    model: Any,
    texts: Mapping[str, Texts] | Texts,
    *,
    epochs: int = 10,
    learning_rate: float = 0.02,
    batch_size: int = 32,
    weight_decay: float = 0.0,
    seed: int = 0,
) -> GateReport:
    """Train all routers to choose each prompt's expert, and change nothing else, bit for bit.

    texts: by expert its texts ("(base)" too, with `null_expert`), or texts with expert_targets.
    Each router's loss is the cross-entropy of its logits on the prompt: one row a prompt at
    sequence level, one a token at token level. AdamW, the learning rate falling to 0 in a line.
    With router_scope="model" the forward pass ends at the router; what a sequence router reads
    there, if it pools by mean or last token, is computed once for all epochs.

    Raises:
        ValueError, TypeError: no texts, unknown experts, texts without expert_targets, options out
        of range, or
            inside `use_experts`.
    """
    check_options(
        epochs=epochs,
        learning_rate=learning_rate,
        batch_size=batch_size,
        weight_decay=weight_decay,
        seed=seed,
    )
    labelled = labelled_texts(model, texts)
    start, losses, right, counted = time.perf_counter(), [], 0, 0
    with _routers_alone(model, seed) as parameters:
        optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=weight_decay)
        rows, batches = len(labelled), _batches(model, labelled, batch_size)
        steps = epochs * -(-rows // batch_size)
        decay = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
        generator = torch.Generator().manual_seed(seed)
        for _ in range(epochs):
            order, total, right, counted = (
                torch.randperm(rows, generator=generator).tolist(),
                0.0,
                0,
                0,
            )
            for begin in range(0, rows, batch_size):
                pairs = batches(order[begin : begin + batch_size])
                loss, hits, seen = _loss(pairs)
                gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
                for parameter, gradient in zip(parameters, gradients):
                    parameter.grad = gradient
                optimizer.step()
                decay.step()
                total, right, counted = (
                    total + float(loss.detach()) * seen,
                    right + hits,
                    counted + seen,
                )
            losses.append(total / max(counted, 1))
    return GateReport(losses, right / max(counted, 1), steps, time.perf_counter() - start)


def check_options(**options: Any) -> None:
    """Raise where `train_gate` would refuse these options, for recipes that come to it late.

    Raises:
        ValueError, TypeError: an option that does not exist, or out of range.
    """
    known = {"epochs": 1, "learning_rate": None, "batch_size": 1, "weight_decay": None, "seed": 0}
    if unknown := sorted(set(options) - set(known)):
        raise ValueError(
            f"train_gate has no option {unknown}. Its options are: {', '.join(known)}."
        )
    for name, value in options.items():
        low = known[name]
        if low is not None:
            check_integer(name, value, low)
        else:
            check_number(name, value, 0.0, float("inf"), open_low=name == "learning_rate")


@torch.no_grad()
def prompt_features(model: Any, texts: Texts, batch_size: int = 32) -> Tensor:
    """What the model's first router reads of each prompt, `[n, d]` fp32 on the CPU; at token level
    the mean over it.

    Raises:
        ValueError: no texts, or inside `use_experts`, where no router reads.
    """
    _check_asked(model)
    if not len(texts):
        raise ValueError("There are no texts to take features of: give one at least.")
    router = next(iter(model.moelora.routers.values()))
    training, found = model.training, []
    model.eval()
    try:
        for begin in range(0, len(texts), batch_size):
            batch = padded(
                texts.subset(range(begin, min(begin + batch_size, len(texts)))).prompts(),
                model.device,
            )
            found.append(_read(model, router, batch).float().cpu())
    finally:
        model.train(training)
    return torch.cat(found)


def labelled_texts(model: Any, texts: Mapping[str, Texts] | Texts) -> Texts:
    """All texts with expert_targets, of which at least one must count.

    Raises:
        ValueError, TypeError: as `train_gate`.
    """
    _check_asked(model)
    names = model.moelora_config.choice_names
    if isinstance(texts, Mapping):
        if unknown := sorted(set(texts) - set(names)):
            raise ValueError(
                f"There is no expert {', '.join(map(repr, unknown))}. The choices are: {', '.join(names)}."
            )
        for name, own in texts.items():
            _check_texts(repr(name), own)
        texts = Texts.joined([own.labelled(names.index(name)) for name, own in texts.items()])
    _check_texts("texts", texts)
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
                f"Row {number} has expert_targets {targets.tolist()}; expected 0 … {len(names) - 1} or −100."
            )
    if all(bool((row["expert_targets"] == IGNORE).all()) for row in texts.rows):
        raise ValueError("There are no expert_targets that count: all are −100.")
    return texts


def _check_asked(model: Any) -> None:
    if model.moelora.forcing is not None:
        raise ValueError(
            "The routers have no say, or not all of it, inside use_experts(): leave it first."
        )


def _check_texts(name: str, texts: Any) -> None:
    if not isinstance(texts, Texts):
        raise TypeError(
            f"{name} is a {type(texts).__name__}; expected Texts (Texts.of(rows, tokenizer) makes them)."
        )


def padded(prompts: Sequence[Tensor], device: Any = None) -> dict[str, Tensor]:
    """Prompts as one batch, padded on the right: input_ids and attention_mask `[batch, length]`."""
    ids = pad_sequence(list(prompts), batch_first=True)
    mask = pad_sequence([torch.ones_like(prompt) for prompt in prompts], batch_first=True)
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device)}


@contextmanager
def _routers_alone(model: Any, seed: int) -> Iterator[list[nn.Parameter]]:
    """The routers' parameters, trainable while inside; then everything is as it was, but for their
    values.
    """
    routers, training = model.moelora.routers, model.training
    parameters = list(routers.parameters())
    before = [(parameter, parameter.requires_grad, parameter.grad) for parameter in parameters]
    model.eval()
    routers.train()
    try:
        # The routers' jitter noise draws from the global generators.
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            for parameter in parameters:
                parameter.requires_grad_(True)
            yield parameters
    finally:
        for parameter, trains, gradient in before:
            parameter.requires_grad_(trains)
            parameter.grad = gradient
        model.train(training)


def _batches(
    model: Any, texts: Texts, batch_size: int
) -> Callable[[list[int]], list[tuple[Tensor, Tensor]]]:
    """A function from rows' numbers to (logits, targets) of each router."""
    config, routers = model.moelora_config, list(model.moelora.routers.values())
    sequences = config.routing_level == "sequence"
    prompts = texts.prompts()
    targets = [_targets(row, len(prompt), sequences) for row, prompt in zip(texts.rows, prompts)]
    if sequences and config.router_scope == "model" and config.router_pooling != "attention":
        (router,) = routers
        features = prompt_features(model, texts, batch_size).to(model.device)
        # The routers train, whatever mode the features were computed in.
        router.train()
        labels = torch.stack(targets).to(model.device)
        return lambda rows: [(router(features[rows]).logits, labels[rows])]

    def run(rows: list[int]) -> list[tuple[Tensor, Tensor]]:
        batch = padded([prompts[i] for i in rows], model.device)
        if sequences:
            labels = torch.stack([targets[i] for i in rows])
        else:
            labels = pad_sequence(
                [targets[i] for i in rows], batch_first=True, padding_value=IGNORE
            ).reshape(-1)
        return [
            (routing.logits, labels.to(routing.logits.device))
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
    """The mean over routers of the cross-entropy, how many rows of all of them were right, and of
    how many.
    """
    losses, right, counted = [], 0, 0
    for logits, targets in pairs:
        there = targets != IGNORE
        losses.append(
            nn.functional.cross_entropy(logits[there], targets[there])
            if bool(there.any())
            else 0 * logits.sum()
        )
        right += int((logits.argmax(-1) == targets)[there].sum())
        counted += int(there.sum())
    return torch.stack([loss.to(losses[0].device) for loss in losses]).mean(), right, counted


def _read(model: Any, router: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """What `router` reads of a batch of prompts, `[batch, d]`."""
    read: list[Tensor] = []
    handle = router.register_forward_pre_hook(lambda module, args: read.append(args[0]))
    try:
        model.routing_only(**batch)
    finally:
        handle.remove()
    mask, x = batch["attention_mask"], router.normalised(read[0])  # type: ignore[operator]
    if len(x) == len(mask):
        return x
    x, mask = x.view(*mask.shape, -1), mask.to(x)
    return (x * mask.unsqueeze(-1)).sum(1) / mask.sum(1, keepdim=True)
