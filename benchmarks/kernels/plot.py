"""The scaling rows as one figure with a panel for each axis."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.kernels.cases import Suite
from benchmarks.kernels.names import FROZEN

LABELS = {
    "tokens": "tokens T",
    "experts": "experts E",
    "top_k": "experts a token K",
    "rank": "rank r",
}


def plot(rows: list[dict[str, Any]], suite: Suite, path: Path) -> str:
    """Write the PNG, microseconds over T, E, K and r; returns what became of it in a line."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return f"{path.name} is not drawn: matplotlib is not installed"
    figure = Figure(figsize=(11, 8), layout="constrained")
    panels = figure.subplots(2, 2).flat
    for panel, (axis, values) in zip(panels, suite.axes, strict=True):
        scaling = [
            row for row in rows if row.get("measure") == f"scaling {axis}" and "microseconds" in row
        ]
        for name in dict.fromkeys(row["candidate"] for row in scaling):
            points = [
                (row["value"], row["microseconds"]) for row in scaling if row["candidate"] == name
            ]
            style = "k--" if name == FROZEN else "o-"
            panel.plot(
                *zip(*points, strict=True),
                style,
                label=name,
                linewidth=2.5 if "ours" in name else 1.2,
            )
        panel.set(xscale="log", yscale="log", xlabel=LABELS[axis], ylabel="microseconds")
        panel.set_xticks(values, labels=[str(value) for value in values])
        panel.minorticks_off()
        panel.grid(alpha=0.3)
    figure.suptitle(f"The mixture's part alone, forward and backward, around {suite.sweep.name}")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4)
    figure.savefig(path, dpi=120)
    return str(path)
