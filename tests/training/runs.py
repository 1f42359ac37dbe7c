"""What the training tests share: batches, gradients, the router losses by the book, runs."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from bases import VOCAB
from core.mixtures import tokens
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import Trainer, TrainerCallback, TrainingArguments

Gradients = dict[str, Tensor]
COEFFICIENTS = ("router_aux_loss_coef", "router_z_loss_coef")
# Large, so that a router loss that is lost or counted twice cannot hide in a tolerance.
LOSSES = {"router_aux_loss_coef": 0.7, "router_z_loss_coef": 0.2}
NO_LOSSES = dict.fromkeys(COEFFICIENTS, 0.0)
# Models in float64, where transformers still computes norms and the cross-entropy in fp32.
TOLERANCE = 2e-6


def batch(
    rows: int = 4, length: int = 10, padding: int = 0, side: str = "right", seed: int = 3
) -> dict:
    """Rows of different lengths, padded to `length + padding`; labels follow a prompt."""
    ids = tokens(rows, length, seed=seed)
    mask, labels = torch.ones_like(ids), ids.clone()
    for i in range(rows):
        mask[i, length - i % 4 :] = 0
        labels[i, : 2 + i % 3] = -100
    ids, labels = ids * mask, labels.masked_fill(mask == 0, -100)
    pad = (padding, 0) if side == "left" else (0, padding)
    padded = {
        n: torch.nn.functional.pad(t, pad)
        for n, t in (("input_ids", ids), ("attention_mask", mask))
    }
    return {**padded, "labels": torch.nn.functional.pad(labels, pad, value=-100)}


def rows_of(inputs: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """A batch as the list of its rows: a dataset."""
    return [dict(zip(inputs, row)) for row in zip(*inputs.values())]


def classes(rows: int = 4) -> dict:
    """A batch for the tiny classifiers of three classes."""
    return {**batch(rows), "labels": torch.arange(rows) % 3}


def open_window(model: Any, seed: int = 5) -> Tensor:
    """Pretend that a step with unequal loads came before; returns its fractions `[num_routers, E]`.

    Without one the fractions are equal and the balancing loss is a constant.
    """
    load = model.moelora.load
    counts = torch.randint(1, 60, load.current.shape, generator=torch.Generator().manual_seed(seed))
    load.current.copy_(counts)
    return counts / counts.sum(1, keepdim=True)


def gradients_of(model: Any) -> Gradients:
    """A copy of what lies in `.grad` of every trainable parameter."""
    return {
        n: torch.zeros_like(p) if p.grad is None else p.grad.clone()
        for n, p in model.named_parameters()
        if p.requires_grad
    }


def gradients(model: Any, scale: float = 1.0, window: int | None = 5, **inputs: Any) -> Gradients:
    """The gradients of one training step on `inputs`, of `scale` times the model's loss."""
    if window is not None:
        open_window(model, window)
    model.train().zero_grad()
    torch.manual_seed(0)
    loss = model(**inputs).loss
    (loss * scale).backward()
    return gradients_of(model)


def of_router(name: str) -> bool:
    """Whether a parameter's name is a router's, wherever it hangs in the model."""
    return bool({"router", "routers"} & set(name.partition("moelora.")[2].split(".")))


def router_parameters(model: Any) -> list[torch.nn.Parameter]:
    return [p for router in model.moelora.routers.values() for p in router.parameters()]


def only_routers(found: Gradients) -> Gradients:
    return {name: g for name, g in found.items() if of_router(name)}


def assert_same(found: Gradients, expected: Gradients, tolerance: float = TOLERANCE) -> None:
    """Equal in every parameter, to `tolerance` of that parameter's largest gradient."""
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        allowed = tolerance * float(gradient.abs().max().clamp(min=1e-3))
        torch.testing.assert_close(
            found[name], gradient, rtol=0, atol=allowed, msg=lambda m, n=name: f"{n}: {m}"
        )


def difference(found: Gradients, expected: Gradients) -> float:
    """|found − expected| / |expected| over all routers."""
    squares = torch.zeros(2, dtype=torch.float64)
    for name, gradient in only_routers(expected).items():
        squares += torch.stack(
            [(found[name] - gradient).square().sum(), gradient.square().sum()]
        ).double()
    return float((squares[0] / squares[1]).sqrt())


def without_losses(model: Any) -> Any:
    """A copy of `model` whose routers have no losses."""
    plain = copy.deepcopy(model)
    for name in COEFFICIENTS:
        setattr(plain.moelora_config, name, 0.0)
    return plain


def by_the_book(
    model: Any, inputs: dict, fractions: Tensor, targets: Tensor | None = None
) -> tuple:
    """Gradients of CE + router losses by plain autograd, and the router losses' value: the
    specification.

    CE by hand from the logits; the router losses from the routers' logits, caught by hooks.
    """
    plain = without_losses(model).train()
    plain.zero_grad()
    caught: dict[str, Tensor] = {}
    for name, router in plain.moelora.routers.items():
        router.register_forward_hook(
            lambda _, args, out, name=name: caught.update({name: out.logits})
        )
    torch.manual_seed(0)
    outputs = plain(**inputs)
    labels = inputs["labels"]
    if plain.is_classifier:
        ce = cross_entropy(outputs.logits, labels)
    else:
        items = inputs.get("num_items_in_batch")
        logits = outputs.logits[:, :-1].flatten(0, 1).float()
        ce = cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum")
        ce = ce / ((labels[:, 1:] != -100).sum() if items is None else items)
    scores = [caught[name] for name in plain.moelora.routers]
    total = router_losses(model, scores, inputs, fractions, targets)
    (ce + total).backward()
    return gradients_of(plain), total.detach()


def router_losses(
    model: Any, logits: Sequence[Tensor], inputs: dict, fractions: Tensor, targets: Tensor | None
) -> Tensor:
    """Σ over routers and rows of weight · (aux + z + target loss) / (denominator · routers)."""
    config = model.moelora_config
    mask = inputs["attention_mask"].double()
    total = torch.zeros((), dtype=logits[0].dtype)
    for scores, share in zip(logits, fractions.to(logits[0].dtype)):
        by_token = scores.shape[0] == mask.numel()
        weight = mask / mask.sum(1, keepdim=True) if model.is_classifier else mask
        weight = weight.reshape(-1) if by_token else weight.sum(1)
        items = inputs.get("num_items_in_batch")
        probabilities = torch.exp(scores) / torch.exp(scores).sum(1, keepdim=True)
        row = config.router_aux_loss_coef * config.num_experts * (probabilities * share).sum(1)
        row = row + config.router_z_loss_coef * torch.exp(scores).sum(1).log() ** 2
        if targets is not None:
            each = len(row) // targets.numel()
            expert = targets.reshape(-1).repeat_interleave(each)
            picked = probabilities.gather(1, expert.clamp(min=0)[:, None])[:, 0]
            row = row - config.expert_target_loss_coef * torch.where(expert < 0, 0.0, picked.log())
        total = total + (row * weight).sum() / (weight.sum() if items is None else items)
    return total / len(logits)


class Recorder(TrainerCallback):
    """Keeps each optimizer step's gradients, and the expert counts in use while it was taken."""

    def __init__(self):
        self.gradients: list[Gradients] = []
        self.current: list[Tensor] = []
        self.previous: list[Tensor] = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.gradients.append(gradients_of(model))
        self.current.append(model.moelora.load.current.clone())
        self.previous.append(model.moelora.load.previous.clone())


def trainer(
    model: Any, data: list | None, folder: Path, callbacks: Sequence = (), **settings: Any
) -> Trainer:
    """A stock Trainer on the CPU that logs to nobody; what it gets beside `args` is split off
    `settings`.
    """
    others = ("eval_dataset", "data_collator", "compute_metrics", "compute_loss_func", "optimizers")
    given = {name: settings.pop(name) for name in others if name in settings}
    defaults = {
        "output_dir": str(folder),
        "use_cpu": True,
        "report_to": [],
        "disable_tqdm": True,
        "save_strategy": "no",
        "logging_steps": 1,
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 4,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "max_steps": 2,
        "seed": 7,
    }
    args = TrainingArguments(**{**defaults, **settings})
    return Trainer(model, args, train_dataset=data, callbacks=list(callbacks), **given)


def train(model: Any, data: list, folder: Path, **settings: Any) -> Recorder:
    """Train with the stock Trainer, unclipped, and return what was recorded."""
    recorder = Recorder()
    callbacks = [recorder, *settings.pop("callbacks", ())]
    trainer(model, data, folder, callbacks, max_grad_norm=0.0, **settings).train()
    return recorder


def step(
    model: Any, optimizer: torch.optim.Optimizer, set_to_none: bool = True, **inputs: Any
) -> Any:
    """One step of a plain training loop; returns the outputs."""
    optimizer.zero_grad(set_to_none=set_to_none)
    outputs = model(**inputs)
    outputs.loss.backward()
    optimizer.step()
    return outputs


def random_batches(
    count: int, rows: int = 4, length: int = 12, seed: int = 11
) -> Iterator[dict[str, Tensor]]:
    """Batches of random tokens, each its own labels."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        ids = torch.randint(3, VOCAB, (rows, length), generator=generator)
        yield {"input_ids": ids, "labels": ids.clone()}


def bits(model: Any) -> dict[str, Tensor]:
    """A copy of the whole state dict, in the form that checkpoints have whatever is frozen."""
    state = model.moelora.merged(model.state_dict())
    return {name: tensor.clone() for name, tensor in state.items()}


def assert_bits(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    different = [name for name in expected if not torch.equal(found[name], expected[name])]
    assert not different, different
