"""What the examples show: their tables, through rich, and the demo's picture."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from arriving import mean_score
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskProgressColumn, TimeRemainingColumn
from rich.table import Table

if TYPE_CHECKING:
    from arriving import ArrivingTask, Score
    from finetuning import Result

    Scores = Mapping[str, Score]

# Wide enough for the tables also where the output is not a terminal, as in a log.
console = Console(width=None if sys.stdout.isatty() else 120)


def headline(text: str) -> None:
    """Print a rule with a title."""
    console.rule(escape(text), align="left")


def line(text: str) -> None:
    """Print one line as it is, unwrapped."""
    console.print(escape(text), soft_wrap=True, highlight=False)


def arrivals(tasks: list[ArrivingTask]) -> None:
    """Print what the tasks are, in the order in which they arrive."""
    table = Table(title="three tasks arrive one after another; old data goes", show_lines=True)
    for heading in ("task", "texts to learn from", "to be measured on", "a prompt", "its answer"):
        table.add_column(heading)
    for task in tasks:
        row = task.rows[0]
        counts = (str(len(task.train)), str(len(task.test)))
        table.add_row(task.name, *counts, escape(row["prompt"]), escape(row["completion"]))
    console.print(table)


@contextmanager
def progress(total: int) -> Iterator[Callable[[int], None]]:
    """One bar for the whole; what it gives is told how much more is done."""
    with Progress(
        "training and measuring", BarColumn(), TaskProgressColumn(), TimeRemainingColumn(),
        console=console,
    ) as bar:  # fmt: skip
        whole = bar.add_task("", total=total)
        yield lambda part: bar.advance(whole, part)


def score_table(stages: Mapping[str, Sequence[Scores]]) -> None:
    """Print what each candidate scores in the end, the lowest mean loss in bold."""
    table = Table(title="in the end: loss of the answers, nats a token (whole answers right)")
    table.add_column("model")
    last = {name: arrivals[-1] for name, arrivals in stages.items()}
    tasks = list(next(iter(last.values())))
    for heading in (*tasks, "mean"):
        table.add_column(heading, justify="right")
    means = {name: mean_score(scores) for name, scores in last.items()}
    best = min(means, key=lambda name: means[name].loss)
    for name, scores in last.items():
        cells = [
            f"{s.loss:.3f} ({s.right:.0%})"
            for s in (*(scores[task] for task in tasks), means[name])
        ]
        table.add_row(name, *cells, style="bold" if name == best else None)
    console.print(table)
    line(f"lowest mean: {best}")


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


def share_table(share: torch.Tensor, tasks: list[str], experts: list[str]) -> None:
    """Print each expert's share of each task's prompts [T, E]."""
    table = Table(title="which expert the gate picks for new prompts")
    table.add_column("task")
    for expert in experts:
        table.add_column(expert, justify="right")
    for task, row in zip(tasks, share.tolist(), strict=True):
        table.add_row(task, *(f"{part:.1%}" for part in row))
    console.print(table)


def generations(lines: dict[str, tuple[str, str]]) -> None:
    """Print each task's prompt and what the model wrote after it, each on one line."""
    table = Table(title="the mixture answers", show_lines=True)
    for heading in ("task", "prompt", "answer"):
        table.add_column(heading)
    for task, (prompt, text) in lines.items():
        table.add_row(task, *(escape(repr(part)[1:-1]) for part in (prompt, text)))
    console.print(table)


def plot_stages(stages: Mapping[str, Sequence[Scores]], path: str | Path) -> None:
    """Write a PNG: each task's answers' loss after each arrival, a panel a candidate."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.2 * len(stages), 3.4), layout="constrained")
    panels = figure.subplots(1, len(stages), sharey=True)
    for axes, (name, arrivals) in zip(panels, stages.items(), strict=True):
        tasks = list(arrivals[-1])
        for first, task in enumerate(tasks):
            after = range(first, len(tasks))
            losses = [arrivals[i][task].loss for i in after]
            axes.plot(after, losses, marker="o", label=task)
        axes.set_xticks(range(len(tasks)), labels=[f"+ {task}" for task in tasks])
        axes.set_title(name)
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("loss of the answers, nats a token")
    panels[0].legend()
    figure.savefig(path, dpi=120)
