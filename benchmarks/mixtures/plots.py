"""The pictures: loss by size, and what a LoRA of equal size loses as tasks conflict."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from benchmarks.mixtures.figures import Figures, Group

SINGLE = "tab:gray"
MIXTURE = "tab:blue"


def plot_joint(group: Group, path: Path) -> None:
    """Write each model's loss over its trainable parameters, with its seeds' spread, as PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for own in (*group.singles, *group.mixtures):
        colour = SINGLE if own.single else MIXTURE
        spread = [[own.loss.mean - own.loss.low], [own.loss.high - own.loss.mean]]
        size = own.parameters / 1e6
        axes.errorbar(size, own.loss.mean, yerr=spread, fmt="o", color=colour, capsize=3)
        axes.annotate(own.model, (size, own.loss.mean), xytext=(6, 4), textcoords="offset points")
    axes.set_xscale("log")
    axes.set_xlabel("trainable parameters, millions")
    axes.set_ylabel("loss on the answers, nats a token")
    axes.set_title("All tasks at once: single LoRAs (grey) and mixtures")
    figure.savefig(path, dpi=120)


def plot_interference(groups: Sequence[Group], path: Path) -> None:
    """Write each mixture's loss over the LoRA's of equal size, by conflicting tasks, as PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    ratios_of = _ratios(groups)
    for (case, model), points in ratios_of.items():
        counts, ratios = zip(*sorted(points.items()), strict=True)
        axes.plot(counts, ratios, marker="o", label=f"{case}: {model}")
    axes.axhline(1.0, color=SINGLE, linewidth=1)
    axes.axhline(0.95, color=SINGLE, linewidth=1, linestyle=":")
    counts = sorted({count for points in ratios_of.values() for count in points})
    axes.set_xticks(counts, labels=[str(count) for count in counts])
    axes.set_xlabel("conflicting tasks")
    axes.set_ylabel("mixture's loss over that of the LoRA of equal size")
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)


def _ratios(groups: Sequence[Group]) -> dict[tuple[str, str], dict[int, float]]:
    found: dict[tuple[str, str], dict[int, float]] = {}
    for group in groups:
        case = group.case.partition(",")[0]
        for own in group.mixtures:
            equal = group.equal_to(own.model)
            if equal is not None:
                count = len(group.settings["tasks"])
                found.setdefault((case, own.model), {})[count] = _over(own, equal)
    return found


def _over(own: Figures, other: Figures) -> float:
    return own.loss.mean / other.loss.mean
