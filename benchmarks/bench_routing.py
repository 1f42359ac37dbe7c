"""The selector on tasks: does it find the right expert, what does that bring, and what does it
cost, on CPU.

python -m benchmarks.bench_routing [--tasks FOLDER] [--base smollm2|tiny|ID_OR_FOLDER] [--quick]
"""

from __future__ import annotations

import argparse
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from benchmarks.harness import RESULTS
from benchmarks.routing import bases
from benchmarks.routing.parts import ALONE, prepare_process, run_parts
from benchmarks.routing.report import write, write_alone
from benchmarks.routing.settings import Settings, Sizes
from benchmarks.routing.tasks import Task, corpus_tasks, read_tasks

NAMES = "math_svamp,boolq,arc_easy,winogrande"
HARDER = "arc_challenge,openbookqa"
# The sets that the project's own figures are made of, and their terms.
SOURCE = (
    "Data: a sample of what LLM-Adapters (EMNLP 2023) distributes under ODC-By 1.0; the sets are "
    "SVAMP, BoolQ, ARC, WinoGrande and OpenBookQA."
)
CORPUS = (
    "Data: the examples' corpus (sources, headers, documentation and licences on this machine), "
    "cut into blocks."
)


def arguments(words: list[str] | None) -> argparse.Namespace:
    """The command line's options."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--tasks",
        type=Path,
        help="a folder with <task>/train.jsonl, test.jsonl (default: the examples' corpus)",
    )
    parser.add_argument(
        "--names", default=NAMES, help="the tasks, of --tasks (default: %(default)s)"
    )
    parser.add_argument(
        "--harder", default=HARDER, help='more tasks, hard to tell apart; "" for none'
    )
    parser.add_argument(
        "--base", default="smollm2", help="smollm2 (the demo's base), tiny, an id or a folder"
    )
    parser.add_argument("--layers", type=int, help="cut smollm2 or tiny to so many layers")
    parser.add_argument("--seeds", type=int, help="default: 3; with --quick 1")
    parser.add_argument(
        "--workers", type=int, default=2, help="processes side by side, one thread each"
    )
    parser.add_argument("--quick", action="store_true", help="few texts and steps, one seed")
    parser.add_argument(
        "--only",
        choices=list(ALONE),
        help="the gates' accuracies alone, or the harder tasks' losses",
    )
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args(words)
    if options.seeds is None:
        options.seeds = 1 if options.quick else 3
    for name in ("seeds", "workers"):
        if getattr(options, name) < 1:
            raise ValueError(f"{name}={getattr(options, name)}: expected 1 at least.")
    return options


def settings_of(options: argparse.Namespace, folder: Path) -> Settings:
    """What the parts are told; raises ValueError where the tasks cannot be read."""
    tasks: list[Task] = []
    harder: list[Task] = []
    if options.tasks is not None:
        extra = [name for name in options.harder.split(",") if name]
        all_tasks = read_tasks(options.tasks, [*options.names.split(","), *extra])
        tasks = all_tasks[: len(all_tasks) - len(extra)]
        harder = all_tasks[len(all_tasks) - len(extra) :]
    sizes = Sizes.quick() if options.quick else Sizes()
    base = bases.prepare(options.base, options.layers, folder / "base")
    corpus = _corpus(bases.load_tokenizer(base), sizes)
    if options.tasks is None:
        # Nothing else is there to be outside: the third domain teaches what is, the fourth asks.
        outside = (corpus[2], corpus[3])
        learned = (corpus[2].name,)
        tasks = corpus
    else:
        outside = tuple(replace(task, name=f"{task.name} (corpus)") for task in corpus)
        learned = ("python (corpus)", "docs (corpus)")
    return Settings(
        base=base,
        tasks=tuple(tasks),
        harder=tuple(harder),
        outside=outside,
        outside_train=learned,
        seeds=options.seeds,
        sizes=sizes,
        folder=folder,
    )


def _corpus(tokenizer: PreTrainedTokenizerBase, sizes: Sizes) -> list[Task]:
    return corpus_tasks(tokenizer, train=sizes.gate_texts, test=max(40, sizes.scored_texts))


def main(words: list[str] | None = None) -> None:
    """Measure, print the tables, write JSON, Markdown and PNGs."""
    options = arguments(words)
    start = time.perf_counter()
    prepare_process()
    with tempfile.TemporaryDirectory() as folder:
        settings = settings_of(options, Path(folder))
        results = run_parts(settings, options.workers, options.only)
        shown = {
            k: v
            for k, v in vars(options).items()
            if k not in ("output", "tasks", "names", "harder")
        }
        shown |= {"names": settings.names, "harder": [task.name for task in settings.harder]}
        source = CORPUS if options.tasks is None else _source(options.tasks, settings)
        shown["minutes"] = round((time.perf_counter() - start) / 60, 1)
        if options.only:
            print(write_alone(results, shown, source, options.output))
        else:
            print(write(settings, results, shown, source, options.output))
    print(f"{shown['minutes']} minutes; {options.output}")


def _source(folder: Path, settings: Settings) -> str:
    known = {*NAMES.split(","), *HARDER.split(",")}
    return (
        SOURCE if {task.name for task in settings.all_tasks} <= known else f"Data: {folder.name}."
    )


if __name__ == "__main__":
    main()
