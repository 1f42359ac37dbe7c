"""What the demo shows: its tables, through rich, and heatmaps as PNG."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor

if TYPE_CHECKING:
    from finetuning import Corpus, Result

# Wide enough for the tables also where the output is not a terminal, as in a log.
console = Console(width=None if sys.stdout.isatty() else 120)


def headline(text: str) -> None:
    """Print a rule with a title."""
    console.rule(escape(text), align="left")


def line(text: str) -> None:
    """Print one line as it is, unwrapped."""
    console.print(escape(text), soft_wrap=True, highlight=False)


def corpus_table(corpus: Corpus) -> None:
    """Print how many files and tokens each domain gives."""
    table = Table(title="the data: real text of this machine, whole files held out")
    for heading in ("domain", "train files", "train tokens", "held-out files", "held-out tokens"):
        table.add_column(heading, justify="left" if heading == "domain" else "right")
    for domain, parts in corpus.items():
        sizes = [(len(set(part.sources)), part.tokens.numel()) for part in parts]
        table.add_row(domain, *(f"{number:,}" for size in sizes for number in size))
    console.print(table)


def loss_table(results: list[Result]) -> None:
    """Print held-out loss by domain, the lowest of each column in bold."""
    table = Table(title="held-out loss, nats a token (lower is better)")
    table.add_column("model")
    domains = list(results[0].loss)
    for heading in (*domains, "mean", "trainable", "active", "train s"):
        table.add_column(heading, justify="right")
    rows = [[*(result.loss[d] for d in domains), result.mean] for result in results]
    best = [min(column) for column in zip(*rows, strict=True)]
    for result, row in zip(results, rows, strict=True):
        cells = [
            f"[bold]{loss:.4f}[/bold]" if loss == low else f"{loss:.4f}"
            for loss, low in zip(row, best, strict=True)
        ]
        counts = [f"{count / 1e6:.2f} M" for count in (result.trainable, result.active)]
        table.add_row(result.name, *cells, *counts, f"{result.seconds:.0f}")
    console.print(table)
    winner = min(results, key=lambda result: result.mean)
    line(f"lowest mean: {winner.name}")


def share_table(share: torch.Tensor, domains: list[str], experts: list[str]) -> None:
    """Print each expert's share of each domain's tokens, mean over the routers [D, E]."""
    table = Table(title="each expert's share of each domain, mean over all routers")
    table.add_column("domain")
    for expert in experts:
        table.add_column(expert, justify="right")
    for domain, row in zip(domains, share.tolist(), strict=True):
        table.add_row(domain, *(f"{part:.1%}" for part in row))
    console.print(table)


def mutual_information(routing: torch.Tensor) -> torch.Tensor:
    """Return I(domain; expert) of each router in bits [routers], from shares [D, routers, E].

    Domains weigh alike. By router, since routers choose on their own: no two use an expert alike.
    """
    share = routing / routing.sum(dim=-1, keepdim=True)
    overall = share.mean(dim=0, keepdim=True)
    terms = torch.where(share > 0, share * (share / overall).log2(), 0.0)
    return terms.sum(dim=-1).mean(dim=0)


def specialisation(routing: torch.Tensor) -> None:
    """Print how much an expert's choice tells of the domain, from shares [D, routers, E]."""
    bits = mutual_information(routing)
    most = torch.tensor(float(routing.shape[0])).log2()
    line(
        f"an expert tells of the domain: {bits.mean():.3f} bits a token in the mean router, "
        f"{bits.max():.3f} in the best of {len(bits)} (of {most:.0f} possible)"
    )


def generations(lines: dict[str, tuple[str, str]]) -> None:
    """Print each domain's prompt and what the model wrote after it, each on one line."""
    table = Table(title="the mixture writes on", show_lines=True)
    for heading in ("domain", "prompt", "continuation"):
        table.add_column(heading)
    for domain, (prompt, text) in lines.items():
        table.add_row(domain, *(escape(repr(part)[1:-1]) for part in (prompt, text)))
    console.print(table)


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
