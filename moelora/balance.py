"""`ExpertLoad`: how many tokens each expert got, over the window that load balancing refers to."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .config import MoeLoraConfig


class ExpertLoad(nn.Module):
    """Counts by router and expert of the optimizer step under way and of the one before, over all processes.

    The fractions of the balancing loss come from the step before: a constant, so the loss is a plain sum over
    tokens and does not depend on how a batch is cut into micro-batches or spread over processes. The counts are
    in the checkpoint, so that a resumed run goes on with the same bits.

    current, previous: `[num_routers, E]` int64. bias: `[num_routers, E]` fp32 (arXiv:2408.15664).
    """

    current: Tensor
    previous: Tensor
    bias: Tensor

    def __init__(self, config: MoeLoraConfig, num_routers: int, device: torch.device):
        super().__init__()
        shape = (num_routers, config.num_experts)
        self.update_rate = config.router_bias_update_rate
        self.register_buffer("current", torch.zeros(shape, dtype=torch.int64, device=device))
        self.register_buffer("previous", torch.zeros(shape, dtype=torch.int64, device=device))
        self.register_buffer("bias", torch.zeros(shape, device=device))
        self._seen_version: int | None = None

    def begin_forward(self, parameter: nn.Parameter) -> None:
        """Start a new window if an optimizer step lies between the last training forward and this one.

        It does where `parameter`, a router's, has no gradient (the loop cleared it) or was written to.
        """
        version = parameter._version
        if parameter.grad is None or version != self._seen_version:
            self._roll()
        self._seen_version = version

    @torch.no_grad()
    def _roll(self) -> None:
        self.previous.copy_(self.current)
        self.current.zero_()
        if self.update_rate:
            counts = self.previous.to(self.bias.dtype)
            self.bias += self.update_rate * (counts.mean(1, keepdim=True) - counts).sign()

    def end_forward(self, counts: dict[int, Tensor]) -> None:
        """Add one forward pass's counts `[E]` by router, summed over all processes."""
        if not counts:
            return
        total = torch.zeros_like(self.current)
        for index, count in counts.items():
            total[index] = count.to(total.device)
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(total)
        self.current += total

    def count(self, expert_ids: Tensor, weights: Tensor) -> Tensor:
        """How many rows with a weight `[N]` above 0 (no padding) chose each expert, `[E]` int64."""
        num_experts = self.current.shape[1]
        present = (weights > 0).to(torch.int64).unsqueeze(1).expand_as(expert_ids)
        counts = torch.zeros(num_experts + 1, dtype=torch.int64, device=expert_ids.device)
        # Integer sums do not depend on their order, so this has the same bits on every run.
        return counts.scatter_add_(0, (expert_ids + 1).reshape(-1), present.reshape(-1))[1:]

    def fractions(self, index: int) -> Tensor:
        """Each expert's share of the slots of the previous step, `[E]`; equal shares before the first."""
        return self.as_fractions(self.previous[index])

    @staticmethod
    def as_fractions(counts: Tensor) -> Tensor:
        """counts `[E]` over their sum; equal shares where it is 0."""
        total = counts.sum()
        return torch.where(total > 0, counts / total.clamp(min=1), 1.0 / counts.shape[0])

    def selection_bias(self, index: int) -> Tensor | None:
        """What is added to router `index`'s probabilities when it chooses, `[E]`, or None."""
        return self.bias[index] if self.update_rate else None
