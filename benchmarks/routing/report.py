"""What a run leaves: the tables in Markdown, the figures as PNGs, and everything as JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import save, table
from benchmarks.routing.figures import (
    Scores,
    Spread,
    candidate_rows,
    candidates,
    gate_accuracies,
    harder_ratio,
    mean_accuracy,
    mean_loss,
    old_tasks,
    replay_spreads,
    shares,
    targets,
)
from benchmarks.routing.gates import MAIN
from benchmarks.routing.heatmap import plot_routing_heatmap
from benchmarks.routing.parts import Results
from benchmarks.routing.replay import SHARES
from benchmarks.routing.settings import Settings


def write(
    settings: Settings, results: Results, shown: dict[str, Any], source: str, folder: Path
) -> str:
    """Write routing_cpu.json, routing_cpu.md and the PNGs into `folder`; returns the Markdown."""
    folder.mkdir(parents=True, exist_ok=True)
    markdown = "\n\n".join(sections(settings, results, source)) + "\n"
    (folder / "routing_cpu.md").write_text(markdown, encoding="utf-8")
    gates = gate_accuracies(results)
    save(
        "routing_cpu",
        {**shown, "sizes": vars(settings.sizes), "data": source, "seconds": seconds(results)},
        candidate_rows(candidates(settings, results)),
        folder,
        targets=targets(settings, results),
        routing=[{"gate": kind, **vars(spread)} for kind, spread in gates.items()],
        confusion=[r["confusion"] for r in results["gates"]],
        selector=[r["confusion"] for r in results["selector"]],
        latency=[
            {k: v for k, v in results["latency"][0].items() if k not in ("wall", "processor")}
        ],
        replay=[row | {"seed": s} for s, r in enumerate(results["replay"]) for row in r["rows"]],
        base=[{k: r[k] for k in ("share", "kinds")} for r in results.get("outside", [])],
        harder=_harder_json(results),
    )
    plots(settings, results, folder)
    return markdown


def write_alone(results: Results, shown: dict[str, Any], source: str, folder: Path) -> str:
    """Write routing_gates_cpu.json or routing_harder_cpu.json, of a run of that alone; returns its
    table.
    """
    if "harder" in results:
        scores = [r["scores"] for r in results["harder"]]
        found = {name: [s[name] for s in scores] for name in scores[0]}
        over = [{"gate": name, **vars(harder_ratio(results, name))} for name in found]
        save(
            "routing_harder_cpu",
            {**shown, "data": source},
            candidate_rows(found),
            folder,
            over_oracle=over,
        )
        lines = [_candidate_line(name, seeds) for name, seeds in found.items()]
        return table(
            [
                line | {"over the oracle": harder_ratio(results, line["model"]).text()}
                for line in lines
            ]
        )
    gates = gate_accuracies(results)
    rows = [{"gate": kind, "accuracy": spread.text(".4f")} for kind, spread in gates.items()]
    figures = [{"gate": kind, **vars(spread)} for kind, spread in gates.items()]
    save("routing_gates_cpu", {**shown, "data": source}, rows, folder, routing=figures)
    return table(rows)


def _harder_json(results: Results) -> list[dict[str, Any]]:
    if "harder" not in results:
        return []
    scores = [r["scores"] for r in results["harder"]]
    rows = candidate_rows({name: [s[name] for s in scores] for name in scores[0]})
    accuracy = [r["accuracy_harder"] for r in results["gates"]]
    confusion = [r["confusion_harder"] for r in results["gates"]]
    return [*rows, {"routing accuracy": accuracy, "confusion": confusion}]


def seconds(results: Results) -> dict[str, list[float]]:
    """By part the processor's seconds for each seed."""
    return {
        name: [round(found["processor"], 1) for found in seeds] for name, seeds in results.items()
    }


def sections(settings: Settings, results: Results, source: str) -> list[str]:
    """The tables, each under its caption."""
    sizes = settings.sizes
    found = candidates(settings, results)
    tests = sum(len(task.test) for task in settings.tasks)
    latency = results["latency"][0]
    made = [
        "Loss on the target tokens, nats a token, and share of right answers "
        f"({settings.seeds} seeds: mean, and least–greatest where they differ; "
        f"{sizes.scored_texts} test texts a task; adapters of rank {sizes.rank} from "
        f"{sizes.expert_texts} texts a task). {source}",
        table([_candidate_line(name, seeds) for name, seeds in found.items()]),
        f"Share of prompts that go to their own task's expert: {tests} test prompts, "
        f"{sizes.gate_texts} training texts a task (before a deeper layer {sizes.deep_texts} "
        f"prompts a task, the selector {sizes.selector_samples}; "
        f"seeds with a selector: {len(results['selector'])}).",
        table(
            [{"gate": k, "accuracy": s.text(".4f")} for k, s in gate_accuracies(results).items()]
        ),
        "What choosing costs for one prompt, batch 1, one thread, medians "
        f"({latency['prompts']} prompts of {latency['tokens']:.0f} tokens on average).",
        table([{"what": k, "ms": f"{v:.1f}"} for k, v in latency["milliseconds"].items()]),
        "Adding each task last to the others, with a share of their texts replayed: routing "
        "accuracy, and that of the tasks that remain when one of the old ones is deleted again.",
        table([_replay_line(results, share) for share in SHARES]),
    ]
    if "outside" in results:
        made += [
            "The base as a choice: the share of each kind of text that goes to no expert.",
            table(_outside_lines(results)),
        ]
    if "harder" in results:
        made += _harder_section(settings, results)
    goals = [_target_line(row) for row in targets(settings, results)]
    return [*made, "Targets (mean, least and greatest over seeds or rounds).", table(goals)]


def _candidate_line(name: str, seeds: Sequence[Scores]) -> dict[str, Any]:
    line = {"model": name}
    line |= {task: Spread.of(s[task].loss for s in seeds).text() for task in seeds[0]}
    line["mean loss"] = Spread.of(map(mean_loss, seeds)).text()
    right = [value for value in map(mean_accuracy, seeds) if value is not None]
    return line | ({"answers right": Spread.of(right).text(".1%")} if right else {})


def _replay_line(results: Results, share: float) -> dict[str, Any]:
    spreads, after = (replay_spreads(results, share, f) for f in ("accuracy", "accuracy_after"))
    old = old_tasks(spreads)
    return {
        "replay": f"{share:.0%}",
        "old tasks, mean": _mean(old),
        "worst old task": min(spread.mean for spread in old),
        "its worst seed": min(spread.low for spread in old),
        "new task, mean": _mean([s for (added, task), s in spreads.items() if added == task]),
        "all, one deleted": _mean(list(after.values())),
    }


def _target_line(row: dict[str, Any]) -> dict[str, Any]:
    numbers = {name: f"{row[name]:.4g}" for name in ("came", "least", "greatest")}
    return row | numbers | {"met": "yes" if row["met"] else "**no**"}


def _mean(spreads: Sequence[Spread]) -> float:
    return sum(spread.mean for spread in spreads) / len(spreads)


def _outside_lines(results: Results) -> list[dict[str, Any]]:
    found = results["outside"]
    return [
        {
            "texts": source,
            "kind": kind,
            "to the base": Spread.of(r["share"][source] for r in found).text(".1%"),
        }
        for source, kind in found[0]["kinds"].items()
    ]


def _harder_section(settings: Settings, results: Results) -> list[str]:
    scores = [r["scores"] for r in results["harder"]]
    own = Spread.of(r["accuracy_harder"] for r in results["gates"])
    lines = [_candidate_line(name, [s[name] for s in scores]) for name in scores[0]]
    names = ", ".join(task.name for task in settings.harder)
    return [
        f"With {names} added: routing accuracy {own.text('.3f')}; losses of the gate and the "
        "oracle.",
        table(lines),
    ]


def plots(settings: Settings, results: Results, folder: Path) -> None:
    """The confusion matrices, the share that goes to the base, and replay, as PNGs (needs
    matplotlib).
    """
    counts = [r["confusion"] for r in results["gates"]]
    _heatmap(counts, folder / "routing_confusion.png", f"Prompts by expert ({MAIN})")
    if settings.harder:
        harder = [r["confusion_harder"] for r in results["gates"]]
        _heatmap(
            harder, folder / "routing_confusion_harder.png", "Prompts by expert, harder tasks added"
        )
    if "outside" in results:
        found = results["outside"]
        labels = [f"{source}\n({kind})" for source, kind in found[0]["kinds"].items()]
        spreads = [Spread.of(r["share"][source] for r in found) for source in found[0]["kinds"]]
        _bars({"": spreads}, labels, "share that goes to the base", folder / "routing_base.png")
    runs = [replay_spreads(results, share) for share in SHARES]
    labels = [f"{share:.0%} replay" for share in SHARES]
    groups = {f"{task}, old" if added != task else f"{task}, new": [] for added, task in runs[0]}
    for spreads in runs:
        by_name: dict[str, list[Spread]] = {name: [] for name in groups}
        for (added, task), spread in spreads.items():
            by_name[f"{task}, {'new' if added == task else 'old'}"].append(spread)
        for name, own in by_name.items():
            lows = [s.low for s in own]
            highs = [s.high for s in own]
            groups[name].append(Spread(_mean(own), min(lows), max(highs)))
    _bars(dict(sorted(groups.items())), labels, "routing accuracy", folder / "routing_replay.png")


def _heatmap(counts: Sequence[Mapping[str, Mapping[str, int]]], path: Path, title: str) -> None:
    sources = list(counts[0])
    names = list(next(iter(counts[0].values())))
    plot_routing_heatmap(torch.tensor(shares(counts)), sources, names, path, title)


def _bars(
    groups: Mapping[str, Sequence[Spread]], labels: Sequence[str], what: str, path: Path
) -> None:
    """Bars of means, with a line from the least to the greatest."""
    from matplotlib.figure import Figure

    figure = Figure(
        figsize=(2 + 1.1 * len(labels) * max(1, len(groups) / 4), 3.6), layout="constrained"
    )
    axes = figure.subplots()
    width = 0.8 / len(groups)
    for number, (name, spreads) in enumerate(groups.items()):
        places = [i + (number - (len(groups) - 1) / 2) * width for i in range(len(spreads))]
        means = [s.mean for s in spreads]
        errors = [[s.mean - s.low for s in spreads], [s.high - s.mean for s in spreads]]
        bars = axes.bar(places, means, width, yerr=errors, capsize=2, label=name or None)
        axes.bar_label(bars, [f"{mean:.2f}" for mean in means], label_type="center", fontsize=7)
    axes.set_xticks(range(len(labels)), labels=labels, fontsize=8)
    axes.set_ylabel(what)
    axes.set_ylim(0, 1.05)
    if len(groups) > 1:
        axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, dpi=120)
