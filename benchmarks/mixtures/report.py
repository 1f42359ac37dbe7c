"""Tables and pictures of what the store holds, made without any measuring."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.bench_routing import CORPUS, HARDER, NAMES, SOURCE
from benchmarks.harness import table
from benchmarks.mixtures import existing, sequential
from benchmarks.mixtures.figures import Figures, Group, best_of, figures, groups
from benchmarks.mixtures.plots import plot_interference, plot_joint
from benchmarks.mixtures.store import Store
from benchmarks.routing.tasks import DOMAINS

NAME = "mixtures_cpu"
TITLES = {
    "joint": "All tasks at once",
    "sequential": "Tasks one after another, old data gone",
    "existing": "Adapters that exist, of different ranks and targets",
    "interference": "Tasks that conflict",
}
Row = dict[str, Any]


def write(store: Store, folder: Path) -> str:
    """Write `mixtures_cpu.md` and the pictures into `folder`; returns the Markdown."""
    found = groups(store.records())
    everything = [name for record in store.records() for name in record["settings"]["tasks"]]
    sections = [section(group, everything) for group in found]
    several = len({group.settings["base"] for group in found}) > 1
    targets = [row for group in found for row in _targets(group, several)]
    if targets:
        sections.append("## Targets\n\n" + table(targets))
    markdown = "\n\n".join(sections) + "\n"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{NAME}.md").write_text(markdown, encoding="utf-8")
    for ending, own in _by_base(found).items():
        for number, group in enumerate(g for g in own if g.part == "joint"):
            plot_joint(group, folder / f"mixtures_joint{number or ''}{ending}.png")
        conflicts = [group for group in own if group.part == "interference"]
        if conflicts:
            plot_interference(conflicts, folder / f"mixtures_interference{ending}.png")
    return markdown


def _by_base(found: Sequence[Group]) -> dict[str, list[Group]]:
    """The comparisons on each base, by the ending of its pictures' names: "" for one base alone."""
    bases = list(dict.fromkeys(group.settings["base"] for group in found))
    endings = {base: f"_{re.sub(r'[^A-Za-z0-9.-]+', '-', base)}" for base in bases}
    by_base: dict[str, list[Group]] = {}
    for group in found:
        ending = endings[group.settings["base"]] if len(bases) > 1 else ""
        by_base.setdefault(ending, []).append(group)
    return by_base


def section(group: Group, everything: Sequence[str]) -> str:
    """One comparison under its caption; `everything` names all tasks that were measured."""
    own = group.settings
    title = TITLES[group.part] + (f": {group.case}" if group.case else "")
    seeds = sorted({record["settings"]["seed"] for record in group.records})
    steps = f"{own['steps']} steps of {own['batch']} rows"
    if group.part in ("sequential", "existing"):
        steps += " a task"
    caption = (
        f"On {own['base']}: {len(own['tasks'])} tasks ({', '.join(own['tasks'])}), {steps}, seeds "
        f"{seeds}: loss on the answers, nats a token, and share of right answers; means over seeds "
        "(least-greatest), ratios on the seeds that both have."
        f" {source(own['tasks'], everything)}"
    )
    return f"## {title}\n\n{caption}\n\n{table([_line(group, own) for own in figures(group)])}"


def source(tasks: Sequence[str], everything: Sequence[str] = ()) -> str:
    """What the data is, and its terms; of tasks whose names do not say it, that of `everything`,
    of whose rows they are made.
    """
    if own := _sources(tasks):
        return " ".join(own)
    if others := _sources(everything):
        return f"Made of the other parts' rows. {' '.join(others)}"
    return "The source of the data is not recorded."


def _sources(tasks: Sequence[str]) -> list[str]:
    words = " ".join(tasks)
    of_sets = any(name in words for name in (*NAMES.split(","), *HARDER.split(",")))
    of_corpus = not of_sets and any(name in words for name in DOMAINS)
    return [text for text, there in ((SOURCE, of_sets), (CORPUS, of_corpus)) if there]


def _line(group: Group, own: Figures) -> Row:
    row: Row = {"model": own.model, "rate": own.rate, "loss": own.loss.text()}
    if group.part in ("joint", "interference"):
        row["seeds"] = len(own.by_seed)
        row["over the best LoRA"] = f"{group.over_best_single(own):.4f}"
        row["trainable, M"] = own.parameters / 1e6
    else:
        row["over the oracle"] = f"{own.loss.mean / group.oracle:.4f}"
    if own.lost is not None:
        row["worst task lost"] = f"{own.lost.mean:+.1%}"
    if own.accuracy is not None:
        row["right"] = f"{own.accuracy.mean:.1%}"
    if len(group.settings["tasks"]) <= 8:
        row |= own.by_task
    return row


def _targets(group: Group, several: bool) -> list[Row]:
    found = {own.model: own for own in figures(group)}
    where = f"{group.part}{', ' if group.case else ''}{group.case}"
    where += f" on {group.settings['base']}" if several else ""
    rows = []

    def row(what: str, value: float, target: float) -> None:
        met = "yes" if value <= target else "**no**"
        rows.append(
            {
                "what": f"{where}: {what}",
                "came": f"{value:.4f}",
                "target": f"≤ {target}",
                "met": met,
            }
        )

    best = best_of(group.mixtures)
    if group.part == "joint" and best is not None and group.singles:
        goal = 1.0 if set(group.settings["tasks"]) <= set(DOMAINS) else 0.96
        row(f"{best.model} over the best LoRA", group.over_best_single(best), goal)
    if group.part == "interference":
        for own in group.mixtures:
            equal = group.equal_to(own.model)
            if equal is not None:
                row(f"{own.model} over {equal.model}", own.loss.mean / equal.loss.mean, 0.95)
    if group.part == "sequential" and {sequential.ORACLE, sequential.ONE} <= set(found):
        for name in (sequential.OURS, sequential.OURS_2, sequential.DESCRIBED):
            if name in found:
                own = found[name]
                row(f"{name}, over the oracle", own.loss.mean / group.oracle, 1.02)
                one = found[sequential.ONE].loss.mean
                row(f"{name}, over {sequential.ONE}", own.loss.mean / one, 0.7)
                if own.lost is not None:
                    row(f"{name}, worst task lost", own.lost.mean, 0.01)
    if group.part == "existing" and existing.GATED in found and existing.ORACLE in found:
        gated = found[existing.GATED].loss.mean
        row("gate trained, over the oracle", gated / group.oracle, 1.01)
    return rows
