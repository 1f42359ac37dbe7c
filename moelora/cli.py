"""The console command `moelora`: compose, check, export, merge, route, info."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

app = typer.Typer(
    name="moelora",
    help="Mixtures of LoRA experts: one model from the PEFT adapters that you have, and back.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
WEIGHTS = "model.safetensors"
out, err = Console(soft_wrap=True), Console(stderr=True, soft_wrap=True)

Adapters = Annotated[
    list[str],
    typer.Option("--adapter", "-a", help="NAME=FOLDER or NAME=HUB_ID; once for each adapter."),
]
Weights = Annotated[
    list[str],
    typer.Option("--weight", "-w", help="EXPERT=NUMBER; once for each expert of the merge."),
]
Base = Annotated[str, typer.Argument(help="The base: a hub id or a folder.")]
Checkpoint = Annotated[Path, typer.Argument(help="A folder written by save_pretrained or compose.")]
Out = Annotated[Path, typer.Option("--out", "-o", help="The folder to write.")]
Classifier = Annotated[
    bool, typer.Option("--classifier", help="The base is a sequence classifier.")
]
Mismatch = Annotated[
    bool, typer.Option("--allow-base-mismatch", help="The adapters may name another base.")
]
OtherBase = Annotated[
    str | None, typer.Option("--base", help="Where the base is, if not where the checkpoint says.")
]


@app.command(epilog="Example: moelora check my-base -a math=adapters/math -a code=adapters/code")
def check(
    base: Base,
    adapter: Adapters,
    allow_base_mismatch: Mismatch = False,
    classifier: Classifier = False,
) -> None:
    """List all that is wrong with a set of adapters. Exit status 1 where anything is."""
    from .adapters.preflight import preflight

    with _refused(), _busy(f"reading {len(adapter)} adapters"):
        found = preflight(
            base,
            _pairs(adapter),
            allow_base_mismatch=allow_base_mismatch,
            auto_class=_class(classifier).auto_class,
        )
    table = Table("adapter", "rank", "targets", "size", "problems")
    for entry in found.entries:
        described = entry.adapter
        ranks = sorted({t.r for t in described.targets.values()}) if described else []
        size = f"{described.nbytes / 2**20:.1f} MiB" if described else ""
        targets = str(len(described.targets)) if described else ""
        table.add_row(
            entry.name,
            ", ".join(map(str, ranks)),
            targets,
            size,
            "\n".join(entry.problems) or "none",
        )
    out.print(table)
    if not found.ok:
        raise typer.Exit(1)


@app.command(
    epilog="Example: moelora compose my-base -a math=adapters/math -a code=adapters/code -o mixture"
)
def compose(
    base: Base,
    adapter: Adapters,
    out_folder: Out,
    router_init: Annotated[
        str, typer.Option(help="random, or arrow (from the adapters' weights).")
    ] = "random",
    experts_per_token: Annotated[
        int, typer.Option("--top-k", "-k", help="Experts that a token chooses.")
    ] = 2,
    routing_level: Annotated[str, typer.Option(help="token or sequence.")] = "token",
    router_scope: Annotated[str, typer.Option(help="projection, site, layer or model.")] = "site",
    allow_base_mismatch: Mismatch = False,
    classifier: Classifier = False,
) -> None:
    """Make one mixture of adapters, and save it (experts and routers, not the base)."""
    from .config import MoeLoraConfig

    with _refused(), _busy(f"composing {len(adapter)} adapters"):
        pairs = _pairs(adapter)
        config = MoeLoraConfig(
            num_experts=len(pairs), num_experts_per_tok=min(experts_per_token, len(pairs)),
            router="arrow" if router_init == "arrow" else "top_k",
            routing_level=routing_level, router_scope=router_scope,
        )  # fmt: skip
        model = _class(classifier).from_adapters(
            base, pairs, config, router_init=router_init, allow_base_mismatch=allow_base_mismatch
        )
        model.save_pretrained(out_folder)
    out.print(f"{len(pairs)} experts in {out_folder}: {', '.join(name for name, _ in pairs)}")


@app.command(epilog="Example: moelora export mixture math -o adapters/math-again")
def export(
    checkpoint: Checkpoint,
    expert: Annotated[str, typer.Argument(help="The expert's name.")],
    out_folder: Out,
    base: OtherBase = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace what is in the folder.")
    ] = False,
) -> None:
    """Write one expert as a stock PEFT LoRA folder."""
    with _refused(), _busy(f"exporting {expert}"):
        _load(checkpoint, base).export_expert(expert, out_folder, overwrite=overwrite)
    out.print(f"{expert} in {out_folder}")


@app.command(epilog="Example: moelora merge mixture -w math=0.7 -w code=0.3 -o merged --rank 16")
def merge(
    checkpoint: Checkpoint,
    weight: Weights,
    out_folder: Out,
    rank: Annotated[
        int | None, typer.Option(help="Compress to this rank by SVD; else exact.")
    ] = None,
    recipe: Annotated[str, typer.Option(help="How the experts' changes become one.")] = "linear",
    density: Annotated[
        float | None, typer.Option(help="Of ties, dare_… and breadcrumbs: the part kept.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of dare_…: what is dropped.")] = None,
    base: OtherBase = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace what is in the folder.")
    ] = False,
) -> None:
    """Write a fixed mixture of experts as one stock PEFT LoRA folder."""
    with _refused(), _busy("merging"):
        weights = {name: _number(name, value) for name, value in _pairs(weight)}
        model = _load(checkpoint, base)
        options = {
            name: value
            for name, value in (("density", density), ("seed", seed))
            if value is not None
        }
        report = model.export_merged(
            weights, out_folder, rank=rank, recipe=recipe, overwrite=overwrite, **options
        )
    out.print(f"{' + '.join(f'{w:g}·{name}' for name, w in weights.items())} in {out_folder}")
    out.print(str(report))


@app.command(epilog="Example: moelora route --model mixture < prompts.jsonl > routed.jsonl")
def route(
    model: Annotated[
        Path, typer.Option("--model", "-m", help="A folder written by save_pretrained or compose.")
    ],
    base: OtherBase = None,
    input_file: Annotated[
        Path | None, typer.Option("--input", "-i", help="Else standard input.")
    ] = None,
    output_file: Annotated[
        Path | None, typer.Option("--output", "-o", help="Else standard output.")
    ] = None,
    batch_size: Annotated[
        int, typer.Option(min=1, help="Lines read before they are answered.")
    ] = 16,
    field: Annotated[
        str | None, typer.Option(help="Where the prompt is; else prompt, instruction or messages.")
    ] = None,
    top: Annotated[
        int | None, typer.Option(min=1, help="Show the N most probable experts; else all.")
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the output file.")
    ] = False,
) -> None:
    """Say which expert each prompt needs, for an engine that serves them.

    A line in is a JSON object with a prompt (a text, or chat messages), or a string; a line out has
    "expert", "probabilities" and the line's "id", or "error". One line out for each line in, in
    order, batch by batch. Exit status 1 where any line could not be routed.
    """
    from .serving import load_tokenizer, route_lines, write_answers

    with _refused(), _opened(input_file, "rb", sys.stdin.buffer) as lines:
        if output_file is not None and output_file.exists():
            if input_file is not None and output_file.samefile(input_file):
                raise ValueError(f"{output_file} is the input too: choose another --output.")
            if not overwrite:
                raise ValueError(
                    f"{output_file} exists: choose another --output, or pass --overwrite."
                )
        with _busy("loading"):
            loaded = _load(model, base)
            tokenizer = load_tokenizer(loaded, model)
        with _opened(output_file, "w", sys.stdout) as to:
            answers = route_lines(loaded, tokenizer, lines, batch_size, field, top)
            failed, total = write_answers(
                answers, to, lambda text: err.print(text, markup=False, highlight=False)
            )
    if failed:
        err.print(f"{failed} of {total} lines could not be routed.", highlight=False)
        raise typer.Exit(1)


@app.command(epilog="Example: moelora info mixture")
def info(checkpoint: Checkpoint) -> None:
    """Say what a checkpoint holds, without its base."""
    from .checkpoint.load import read

    with _refused():
        tensors, config, _ = read(checkpoint / WEIGHTS)
    table = Table(
        "expert", "rank", "alpha", "parameters", title=f"{checkpoint}: {config.num_experts} experts"
    )
    sites = config.sites or []
    own = dict.fromkeys(config.expert_names or [], 0)
    for linears in sites:
        a_width = tensors[_key(linears[0], "lora_A")].shape[1]
        for number, linear in enumerate(linears):
            b_width = tensors[_key(linears[0], f"linears.{number}.lora_B")].shape[1]
            for name, r in zip(own, config.ranks_of(linear)):
                own[name] += r * (a_width + b_width)
    alphas = [s * r for s, r in zip(config.scaling, config.ranks)]
    for name, r, alpha in zip(own, config.ranks, alphas):
        table.add_row(name, str(r), f"{alpha:g}", f"{own[name]:,}")
    out.print(table)
    out.print(f"base: {config.base_model_name_or_path} ({config.base_architecture})")
    out.print(
        f"router: {config.router}, top {config.num_experts_per_tok}, {config.routing_level} level, scope "
        f"{config.router_scope}; {sum(map(len, sites))} linears at {len(sites)} sites"
    )


def _key(site: str, part: str) -> str:
    return f"moelora.sites.{site.replace('.', '-')}.{part}.weight"


def _class(classifier: bool) -> Any:
    from .modeling import MoeLoraForCausalLM, MoeLoraForSequenceClassification

    return MoeLoraForSequenceClassification if classifier else MoeLoraForCausalLM


def _load(checkpoint: Path, base: str | None) -> Any:
    """The saved mixture, of the class that its base has."""
    from .checkpoint.load import read

    _, config, _ = read(checkpoint / WEIGHTS)
    classifier = str(config.base_architecture or "").endswith("ForSequenceClassification")
    return _class(classifier).from_pretrained(
        str(checkpoint), **({} if base is None else {"base": base})
    )


def _pairs(words: list[str]) -> list[tuple[str, str]]:
    found = []
    for word in words:
        name, equals, value = word.partition("=")
        if not (name and equals and value):
            raise ValueError(f"{word!r} is no NAME=VALUE, for example math=adapters/math.")
        found.append((name, value))
    return found


def _number(name: str, value: str) -> float:
    try:
        return float(value)
    except ValueError:
        raise ValueError(f"The weight of {name!r} is {value!r}, expected a number.") from None


@contextmanager
def _refused() -> Iterator[None]:
    """What the library refuses is a message and exit status 1, no traceback."""
    try:
        yield
    except BrokenPipeError:
        raise  # Who reads the output has enough; the command ends quietly.
    except (ValueError, TypeError, OSError) as error:
        err.print(f"[bold red]error:[/] {type(error).__name__}", highlight=False)
        err.print(str(error), markup=False, highlight=False)
        raise typer.Exit(1) from error


@contextmanager
def _busy(what: str) -> Iterator[None]:
    """A spinner while it lasts; on standard error, so that the output can be piped."""
    with err.status(what):
        yield


@contextmanager
def _opened(path: Path | None, mode: str, standard: Any) -> Iterator[Any]:
    """The file, or where there is none a standard stream, which stays open."""
    if path is None:
        yield standard
        return
    with open(path, mode, encoding=None if "b" in mode else "utf-8") as file:
        yield file


def main() -> None:
    """The entry point of the console script."""
    app()


if __name__ == "__main__":
    main()
