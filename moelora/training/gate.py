"""Training the routers alone on expert labels: whose a prompt is; nothing else moves."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..core.losses import IGNORE
from ..core.model import MixtureModel, evaluating
from ..validation import check_integer, check_names, check_number
from .datasets import Texts, check_texts, padded_batch
from .evaluation import check_not_overridden

SETTINGS: dict[str, Callable[[str, Any], None]] = {
    "epochs": partial(check_integer, low=1),
    "learning_rate": partial(check_number, low=0.0, high=math.inf, open_low=True),
    "batch_size": partial(check_integer, low=1),
    "weight_decay": partial(check_number, low=0.0, high=math.inf),
    "seed": partial(check_integer, low=0),
}


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
        texts: by expert its texts ("(base)" too, with `null_expert`), or texts with expert_targets;
            with router="context" each row has its router_context `[n]`.
        epochs: how often every text is seen.
        learning_rate: of the first step.
        batch_size: prompts a step.
        weight_decay: of AdamW.
        seed: of the texts' order and of the routers' jitter noise.

    Raises:
        ValueError: no texts, unknown experts, texts without expert_targets, options out of range,
            routers that have nothing to learn, or inside `use_experts`.
        TypeError: no Texts, or an option of another type.
    """
    given = {"epochs": epochs, "learning_rate": learning_rate, "batch_size": batch_size}
    check_options(**given, weight_decay=weight_decay, seed=seed)
    labelled = labelled_texts(model, texts)
    start = time.perf_counter()
    steps = epochs * math.ceil(len(labelled) / batch_size)
    means = []
    with evaluating(model), torch.random.fork_rng(), routers_training(model, True) as parameters:
        # The routers' jitter noise draws from the global generators.
        torch.manual_seed(seed)
        model.moelora.routers.train()
        optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=weight_decay)
        decay = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
        routed = _batches(model, labelled, batch_size)
        generator = torch.Generator().manual_seed(seed)
        for _ in range(epochs):
            order = torch.randperm(len(labelled), generator=generator)
            sums = torch.zeros(3, dtype=torch.float64)
            for numbers in order.split(batch_size):
                optimizer.zero_grad()
                sums += _backward(*routed(numbers.tolist()), parameters)
                optimizer.step()
                decay.step()
            means.append((sums[:2] / sums[2].clamp(min=1)).tolist())
    losses, accuracies = map(list, zip(*means))
    return GateReport(losses, accuracies[-1], steps, time.perf_counter() - start)


def check_options(**options: Any) -> None:
    """Raise where `train_gate` would refuse these options, for recipes that come to it late."""
    if unknown := sorted(set(options) - set(SETTINGS)):
        known = ", ".join(SETTINGS)
        raise ValueError(f"train_gate has no option {unknown}. Its options are: {known}.")
    for name, value in options.items():
        SETTINGS[name](name, value)


def check_routers_learn(model: MixtureModel) -> None:
    """Raise where the routers have no parameters, so that there is nothing to train."""
    if not model.moelora.routers_have_parameters:
        raise ValueError(
            f"router={model.moelora_config.router!r} has no parameters, so there is nothing to "
            "train: make the mixture with another router."
        )


@torch.no_grad()
def prompt_features(model: MixtureModel, texts: Texts, batch_size: int = 32) -> Tensor:
    """What the model's first router reads of each prompt, `[n, d]` fp32 on the CPU.

    At token level it is the mean over the prompt's tokens.

    Args:
        model: the mixture.
        texts: the prompts' texts.
        batch_size: prompts a forward pass.

    Raises:
        ValueError: no texts, a router that reads no hidden states, or inside `use_experts`, where
            none reads.
    """
    check_not_overridden(model)
    check_texts("texts", texts)
    router = model.moelora.router_list[0]
    if router.reads != "hidden_states":
        raise ValueError(
            f"router={model.moelora_config.router!r} reads no hidden states, so prompts have no "
            "features: use a router that does."
        )
    read: list[Tensor] = []

    def note(module: nn.Module, args: tuple, kwargs: dict) -> None:
        x = args[0]
        prompt = kwargs.get("prompt")
        mask = kwargs.get("prompt_mask") if prompt is None else prompt.mask
        x = router.pool(x, mask) if x.dim() == 3 else x
        read.append(router.normalised(x))

    features = []
    prompts = [{"input_ids": prompt} for prompt in texts.prompts()]
    with evaluating(model), router.register_forward_pre_hook(note, with_kwargs=True):
        for begin in range(0, len(texts), batch_size):
            batch = padded_batch(prompts[begin : begin + batch_size], model.device)
            model.routing_only(**batch)
            x = read.pop()
            if model.moelora.by_token and not router.reads_prompt:
                mask = batch["attention_mask"].to(x)
                x = x.view(*mask.shape, -1) * mask.unsqueeze(-1)
                x = x.sum(1) / mask.sum(1, keepdim=True)
            features.append(x.float().cpu())
    return torch.cat(features)


def labelled_texts(model: MixtureModel, texts: Mapping[str, Texts] | Texts) -> Texts:
    """All texts with expert_targets, of which at least one must count."""
    check_not_overridden(model)
    names = model.moelora_config.choice_names
    check_routers_learn(model)
    if isinstance(texts, Mapping):
        check_names(texts, names)
        for name, own in texts.items():
            check_texts(repr(name), own, may_be_empty=True)
        texts = Texts.joined([own.labelled(names.index(name)) for name, own in texts.items()])
    check_texts("texts", texts)
    allowed = {IGNORE, *range(len(names))}
    found = set()
    for number, row in enumerate(texts.rows):
        if "expert_targets" not in row:
            raise ValueError(f"Row {number} has no expert_targets: use Texts.labelled(…).")
        targets = row["expert_targets"]
        own = set(targets.flatten().tolist())
        if not own <= allowed:
            expected = f"expected 0 … {len(names) - 1} or −100"
            raise ValueError(f"Row {number} has expert_targets {targets.tolist()}; {expected}.")
        found |= own
    if found <= {IGNORE}:
        raise ValueError("There are no expert_targets that count: all are −100.")
    return texts


@contextmanager
def routers_training(model: MixtureModel, train: bool) -> Iterator[list[nn.Parameter]]:
    """The routers' parameters, which inside train or not; then their gradients are as before."""
    parameters = list(model.moelora.routers.parameters())
    with ExitStack() as stack:
        for parameter in parameters:
            stack.callback(setattr, parameter, "grad", parameter.grad)
            stack.callback(parameter.requires_grad_, parameter.requires_grad)
            parameter.requires_grad_(train)
        yield parameters


def _batches(
    model: MixtureModel, texts: Texts, batch_size: int
) -> Callable[[list[int]], tuple[list[Tensor], Tensor]]:
    """From rows' numbers to each router's logits `[N, choices]`, and their targets `[N]`."""
    config = model.moelora_config
    sequences = not model.moelora.by_token
    rows = []
    for row, prompt in zip(texts.rows, texts.prompts()):
        targets = row["expert_targets"]
        if sequences and targets.dim():
            raise ValueError("A sequence router chooses once: give expert_targets one number each.")
        if not sequences:
            targets = targets if targets.dim() else targets.expand(len(row["input_ids"]))
            targets = targets[row["router_mask"]] if "router_mask" in row else targets
        own = {"input_ids": prompt, "expert_targets": targets}
        if "router_context" in row:
            own["router_context"] = row["router_context"]
        rows.append(own)
    pools = sequences and model.moelora.router_list[0].reads == "hidden_states"
    if pools and config.router_scope == "model" and config.router_pooling != "attention":
        (router,) = model.moelora.routers.values()
        features = prompt_features(model, texts, batch_size).to(model.device)
        labels = torch.stack([row["expert_targets"] for row in rows]).to(model.device)
        return lambda numbers: ([router(features[numbers]).logits], labels[numbers])

    def run(numbers: list[int]) -> tuple[list[Tensor], Tensor]:
        batch = padded_batch([rows[i] for i in numbers], model.device)
        targets = batch.pop("expert_targets").reshape(-1)
        return [routing.logits for routing in model.routing_only(**batch)], targets

    return run


def _backward(logits: list[Tensor], targets: Tensor, parameters: list[nn.Parameter]) -> Tensor:
    """Give the parameters the gradient of the mean over routers of the cross-entropy.

    Returns that loss times the rows, how many rows were right, and how many there are.
    """
    there = targets != IGNORE
    losses = []
    right = 0
    rows = 0
    for own in logits:
        counted = own[there.to(own.device)]
        wanted = targets[there].to(own.device)
        # An expert that this router's layer does not have cannot be learned there.
        possible = counted.detach().gather(1, wanted[:, None]).squeeze(1) > -torch.inf
        counted = counted[possible]
        wanted = wanted[possible]
        # Of no rows the mean would be NaN.
        loss = nn.functional.cross_entropy(counted, wanted) if len(wanted) else own[:0].sum()
        losses.append(loss.to(parameters[0].device))
        right += int((counted.argmax(-1) == wanted).sum())
        rows += len(wanted)
    loss = torch.stack(losses).mean()
    loss.backward(inputs=parameters)
    return torch.tensor([float(loss.detach()) * rows, right, rows], dtype=torch.float64)
