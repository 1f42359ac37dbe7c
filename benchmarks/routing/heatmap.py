"""Shares as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor


def plot_routing_heatmap(
    shares: Tensor,
    row_labels: Sequence[str],
    column_labels: Sequence[str],
    path: str | Path,
    title: str = "Share of choices",
) -> None:
    """Write `shares` `[rows, E]` as a PNG heatmap with numbers in its cells; needs matplotlib."""
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
