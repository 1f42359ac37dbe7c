"""Collapse in words: routers that leave experts without work, and what to change."""

from __future__ import annotations

import torch
from torch import Tensor

from ..config import MoeLoraConfig
from ..registry import router_class

# An expert is idle below this part of an even share of the slots.
IDLE = 0.1
# Slots a choice that are counted before anything is said: an even share of 20, of which an expert
# in use gets 2 or fewer by chance once in a million times.
ENOUGH = 20


def shares_of(counts: Tensor) -> Tensor:
    """Each choice's share of a row's counts `[…, C]`, 0 in a row without any."""
    return counts / counts.sum(-1, keepdim=True).clamp(min=1)


def collapse_in_words(
    shares: Tensor, in_use: int, config: MoeLoraConfig, router_names: list[str]
) -> str:
    """What is wrong where a router leaves at least half of the experts idle that it could do
    without, with its name, the numbers and what to change; "" where none does.

    Args:
        shares: each choice's share of a router's slots, `[num_routers, C]`.
        in_use: how many experts a row uses at least, which are never idle all.
        config: of the mixture.
        router_names: what each router routes.
    """
    idle = shares[:, : config.num_routed_experts] < IDLE / shares.shape[1]
    counts = idle.sum(1)
    collapsed = (counts > 0) & (2 * counts >= config.num_routed_experts - in_use)
    if not bool(collapsed.any()):
        return ""
    worst = int(torch.where(collapsed, counts, -1).argmax())
    names = config.choice_names
    unused = [name for name, is_idle in zip(names, idle[worst].tolist()) if is_idle]
    busiest = int(shares[worst].argmax())
    listed = ", ".join(unused[:5]) + (", …" if len(unused) > 5 else "")
    return (
        f"The router of {router_names[worst]} has collapsed: {len(unused)} of its "
        f"{config.num_routed_experts} experts get less than {IDLE:.0%} of an even share "
        f"({listed}), and {names[busiest]} gets {float(shares[worst, busiest]):.0%} of all slots. "
        f"{int(collapsed.sum())} of {len(router_names)} routers have. {_remedy(config)}"
    )


def _remedy(config: MoeLoraConfig) -> str:
    """What helps against it in this configuration."""
    aux = f"raise router_aux_loss_coef (it is {config.router_aux_loss_coef:g})"
    ways = [aux, "lower the learning rate of the routers"]
    rate = config.router_bias_update_rate
    if router_class(config.router).takes_selection_bias:
        ways.append(
            f"raise router_bias_update_rate (it is {rate:g})"
            if rate
            else "set router_bias_update_rate (0.001; 0.01 for runs of a few hundred steps)"
        )
    if config.router == "top_k":
        ways.append("use router='noisy_top_k'")
    return f"What helps: {'; '.join(ways)}."
