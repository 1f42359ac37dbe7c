"""Seeing where tokens go: `RoutingReport`, and the heatmap of experts by domain (or layer)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .routers import Routing

if TYPE_CHECKING:
    from .mixture import Mixture


@dataclass(frozen=True)
class RoutingReport:
    """Which experts the routers chose for a batch, padding left out.

    expert_names: the experts. router_names: what each router routes.
    by_router: `[num_routers, E]` each expert's share of a router's choices (rows sum to 1).
    by_sequence: `[batch, E]` each expert's share of a sequence's choices, over all routers.
    routing: one `Routing` a router, as they came.
    """

    expert_names: list[str]
    router_names: list[str]
    by_router: Tensor
    by_sequence: Tensor
    routing: tuple[Routing, ...]

    @property
    def expert_share(self) -> Tensor:
        """Each expert's share of all choices, `[E]`: the mean over routers."""
        return self.by_router.mean(0)

    def top_experts(self) -> list[str]:
        """For each sequence the name of the expert chosen most."""
        return [self.expert_names[i] for i in self.by_sequence.argmax(1).tolist()]

    def __str__(self) -> str:
        shares = ", ".join(f"{n} {s:.1%}" for n, s in zip(self.expert_names, self.expert_share.tolist()))
        return f"RoutingReport({len(self.router_names)} routers; {shares})"

    @classmethod
    def of(cls, mixture: Mixture, routing: tuple[Routing, ...], inputs: dict[str, Any]) -> RoutingReport:
        """Count the choices in `routing` of a forward pass on `inputs`."""
        tokens = inputs.get("input_ids", inputs.get("inputs_embeds"))
        assert tokens is not None
        batch, length = tokens.shape[:2]
        num_experts = mixture.config.num_experts
        mask = inputs.get("attention_mask")
        present = torch.ones(batch, length) if mask is None else mask.detach().float().cpu()
        by_router, by_sequence = [], torch.zeros(batch, num_experts)
        for router in routing:
            chosen = (
                torch.nn.functional.one_hot(router.expert_ids.cpu() + 1, num_experts + 1)[..., 1:]
                .sum(1)
                .float()
            )
            if chosen.shape[0] == batch * length:
                per_sequence = (chosen.view(batch, length, -1) * present.unsqueeze(-1)).sum(1)
            else:
                per_sequence = chosen.view(batch, -1, num_experts).sum(1)
            by_router.append(_shares(per_sequence.sum(0)))
            by_sequence += _shares(per_sequence)
        names = list(mixture.config.expert_names or [])
        return cls(names, list(mixture.routers), torch.stack(by_router), by_sequence / len(routing), routing)


def plot_routing_heatmap(
    shares: Tensor,
    row_labels: Sequence[str],
    column_labels: Sequence[str],
    path: str | Path,
    title: str = "Share of choices",
) -> None:
    """Write `shares` `[rows, E]` as a PNG heatmap with its numbers in the cells (needs matplotlib)."""
    from matplotlib.figure import Figure

    rows, columns = shares.shape
    figure = Figure(figsize=(1.6 + 0.75 * columns, 1.4 + 0.45 * rows), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(shares.cpu().numpy(), cmap="viridis", vmin=0, aspect="auto")
    axes.set_xticks(range(columns), labels=column_labels, rotation=45, ha="right")
    axes.set_yticks(range(rows), labels=row_labels)
    axes.set_title(title)
    middle = float(shares.max()) / 2
    if rows * columns <= 400:
        for i in range(rows):
            for j in range(columns):
                value = float(shares[i, j])
                color = "white" if value < middle else "black"
                axes.text(j, i, f"{value:.0%}", ha="center", va="center", color=color, fontsize=8)
    figure.colorbar(image, ax=axes)
    figure.savefig(path, dpi=120)


def _shares(counts: Tensor) -> Tensor:
    return counts / counts.sum(-1, keepdim=True).clamp(min=1)
