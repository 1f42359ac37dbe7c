"""`LoadWindow`: how many tokens each expert got, over the window that load balancing refers to."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..config import MoeLoraConfig
from ..host_internals import gradient_is_elsewhere, is_partitioned, own_part
from .experts import is_sharded


class LoadWindow(nn.Module):
    """How many tokens each expert got, over the window that load balancing refers to.

    Counts by router and expert of the optimizer step under way and of the one before, over all
    processes. The fractions of the balancing loss come from the step before: a constant, so the
    loss is a plain sum over tokens and does not depend on how a batch is cut into micro-batches or
    spread over processes. The counts are in the checkpoint: a resumed run goes on with the same
    bits.

    Args:
        config: the mixture's.
        num_routers: the number of rows of each buffer.
        device: of the buffers: current and previous `[num_routers, C]` int64, C the routed experts
            and, where there is one, the null expert (a balancing loss without it would send all
            tokens there, arXiv:2406.13233); bias, the same in fp32 (arXiv:2408.15664).

    Attributes:
        sizes: how many of the C choices each router has; the others are never counted, and whatever
            their bias, never chosen.
    """

    current: Tensor
    previous: Tensor
    bias: Tensor
    last_seen: Tensor

    def __init__(self, config: MoeLoraConfig, num_routers: int, device: torch.device):
        super().__init__()
        shape = (num_routers, config.num_choices)
        self.null_expert = config.null_expert
        self.sizes = (config.num_choices,) * num_routers
        self.update_rate = config.router_bias_update_rate
        self.register_buffer("current", torch.zeros(shape, dtype=torch.int64, device=device))
        self.register_buffer("previous", torch.zeros(shape, dtype=torch.int64, device=device))
        self.register_buffer("bias", torch.zeros(shape, device=device))
        # A router's parameter at the last training forward; a buffer, so that it moves along.
        self.register_buffer("last_seen", torch.empty(0, device=device), persistent=False)
        # Whether a backward pass has gone through a router since the window began.
        self.learned = False
        # The backward pass of the window whose scale was assumed, by its number.
        self.backward: int | None = None

    def resize(self, keep: Sequence[int | None]) -> None:
        """Expert i becomes the former `keep[i]`, or where None a new one without counts.

        The next window begins.
        """
        if self.null_expert:
            keep = [*keep, self.current.shape[1] - 1]
        kept = [(i, e) for i, e in enumerate(keep) if e is not None]
        for name in ("current", "previous", "bias"):
            before = getattr(self, name)
            after = before.new_zeros(len(before), len(keep))
            after[:, [i for i, _ in kept]] = before[:, [e for _, e in kept]]
            setattr(self, name, after)
        self.last_seen = self.last_seen[:0]

    @torch.no_grad()
    def begin_forward(self, parameter: nn.Parameter | None) -> None:
        """Start a new window if an optimizer step lies behind the last training forward.

        It does where `parameter`, a router's, has other values than then, or was given a gradient
        that the loop has cleared since (a step whose learning rate is 0 changes no value), unless
        an engine keeps gradients elsewhere.
        """
        if parameter is None:
            return
        values = _values(parameter)
        cleared = parameter.grad is None and self.learned and not gradient_is_elsewhere(parameter)
        if cleared or self.last_seen.shape != values.shape:
            stepped = torch.ones((), dtype=torch.bool, device=self.current.device)
        else:
            # Not by the tensor's version, which fused optimizers leave as it is; and without asking
            # the device.
            stepped = (values != self.last_seen).any().to(self.current.device)
            if is_partitioned(parameter):
                # One process's part may be nothing but padding.
                stepped = _any_process(stepped)
        self.previous.copy_(torch.where(stepped, self.current, self.previous))
        self.current.masked_fill_(stepped, 0)
        if self.update_rate:
            counts = self.previous.to(self.bias.dtype)
            mean = counts.mean(1, keepdim=True)
            if min(self.sizes) < counts.shape[1]:
                mean = counts.sum(1, keepdim=True) / counts.new_tensor(self.sizes)[:, None]
            step = self.update_rate * (mean - counts).sign()
            self.bias += torch.where(stepped, step, 0.0)
        if parameter.grad is None:
            self.learned = False
            self.backward = None
        elif self.backward is not None and bool(stepped):
            # A loop that sets its gradients to 0 instead.
            self.backward = None
        self.last_seen = values.detach().clone()

    def is_one_backward(self, number: int) -> bool:
        """Whether the backward pass called `number` is the first one of this window."""
        if self.backward is None:
            self.backward = number
        return self.backward == number

    def end_forward(self, counts: dict[int, Tensor]) -> None:
        """Add one forward pass's counts `[C]` by router, summed over all processes."""
        if not counts:
            return
        total = torch.zeros_like(self.current)
        for index, count in counts.items():
            total[index] = count.to(total.device)
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(total)
        self.current += total

    def count(self, expert_ids: Tensor, weights: Tensor) -> Tensor:
        """How many rows with a weight `[N]` above 0 (not padding) made each choice, `[C]`."""
        num_experts = self.current.shape[1] - int(self.null_expert)
        present = (weights > 0).to(torch.int64).unsqueeze(1).expand_as(expert_ids)
        counts = torch.zeros(num_experts + 1, dtype=torch.int64, device=expert_ids.device)
        # Integer sums do not depend on their order, so this has the same bits on every run.
        counts.scatter_add_(0, (expert_ids + 1).reshape(-1), present.reshape(-1))
        return counts.roll(-1) if self.null_expert else counts[1:]

    def fractions(self, index: int) -> Tensor:
        """Each choice's share of the slots of the previous step, `[C]`; at first equal shares."""
        return as_fractions(self.previous[index], self.sizes[index])

    def forward(self, index: int) -> Tensor | None:
        """What is added to router `index`'s probabilities when it chooses, `[C]`, or None."""
        return self.bias[index] if self.update_rate else None


def _values(parameter: nn.Parameter) -> Tensor:
    """A parameter's values: all of them under FSDP2, this process's part under ZeRO-3."""
    if is_partitioned(parameter):
        return own_part(parameter)
    return parameter.full_tensor() if is_sharded(parameter) else parameter  # type: ignore[operator]


def _any_process(flag: Tensor) -> Tensor:
    """Whether `flag` is set in any process."""
    number = flag.to(torch.int32)
    dist.all_reduce(number, dist.ReduceOp.MAX)
    return number > 0


def as_fractions(counts: Tensor, size: int) -> Tensor:
    """counts `[C]` over their sum; where it is 0, equal shares among `size` choices."""
    total = counts.sum()
    return torch.where(total > 0, counts / total.clamp(min=1), 1.0 / size)
