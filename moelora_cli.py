"""The console command `moelora`: check, compose, info, export, merge, route.

A command's errors are a message on standard error and exit status 1, not a traceback. The module
stands beside the package, and each command imports what it needs of it: to import the package takes
torch and transformers, seconds that `moelora --help` has no use for.
"""

from __future__ import annotations

import io
import json
import re
import sys
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path
from typing import Annotated, Any

import typer
from huggingface_hub.errors import StrictDataclassError
from rich.console import Console
from rich.table import Table
from rich.text import Text
from safetensors import SafetensorError
from typer import Argument, Option
from typer.core import TyperGroup

# What users cause; other errors are more often a mistake of this package.
MISTAKES = (ValueError, TypeError, OSError, ImportError, SafetensorError, StrictDataclassError)

# Names and paths are shown as they are, whatever brackets and colons they have.
out, err = (
    Console(stderr=stderr, soft_wrap=True, markup=False, emoji=False, highlight=False)
    for stderr in (False, True)
)

OtherBase = Annotated[str | None, Option("--base", help="Else where the checkpoint says it is.")]
Overwrite = Annotated[bool, Option("--overwrite", help="Replace what is there.")]


class Commands(TyperGroup):
    """Commands whose errors are a message on standard error and exit status 1, not a traceback."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        """Run a command; what a stream cannot encode is written as an escape."""
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="backslashreplace")
        return super().main(*args, **kwargs)

    def invoke(self, ctx: Any) -> Any:
        """Run the command of this context."""
        try:
            return super().invoke(ctx)
        except Exception as error:
            # What typer raises shows itself. A reader that has read enough closes the pipe: the
            # command ends quietly.
            by_typer = isinstance(error, (typer.Exit, typer.Abort)) or hasattr(error, "show")
            if by_typer or isinstance(error, BrokenPipeError) or ctx.params["traceback"]:
                raise
            err.print(Text.assemble(("error: ", "bold red"), type(error).__name__))
            err.print(str(error))
            if not isinstance(error, MISTAKES):
                err.print("This may be a bug: `moelora --traceback …` shows where it happened.")
            raise typer.Exit(1) from error


app = typer.Typer(
    name="moelora",
    cls=Commands,
    help="Mixtures of LoRA experts: one model from the PEFT adapters that you have, and back.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


def _show_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        out.print(f"moelora {version('moelora')}")
        raise typer.Exit


Version = Option("--version", callback=_show_version, is_eager=True, help="Show the version.")
Traceback = Option("--traceback", help="Show where an error happened.")


@app.callback()
def options(
    version: Annotated[bool, Version] = False, traceback: Annotated[bool, Traceback] = False
) -> None:
    """Take the options that stand before the command."""


def busy(what: str) -> AbstractContextManager[Any]:
    """A spinner while it lasts; on standard error, so that the output can be piped."""
    return err.status(Text(what))


def public_class(classifier: bool) -> Any:
    """The model class for a language model or a classifier."""
    from moelora.modeling import MoeLoraForCausalLM, MoeLoraForSequenceClassification

    return MoeLoraForSequenceClassification if classifier else MoeLoraForCausalLM


def read_checkpoint(folder: Path) -> tuple[Any, Any, Any]:
    """The tensors, the configuration and the base's fingerprint in a folder."""
    from moelora.checkpoint.load import read

    path = folder / "model.safetensors"
    if not path.is_file():
        raise ValueError(f"{folder} holds no {path.name}: it is not a moelora checkpoint.")
    return read(path)


def load(folder: Path, base: str | None) -> Any:
    """The saved mixture, of the class that its base has."""
    config = read_checkpoint(folder)[1]
    classifier = str(config.base_architecture or "").endswith("ForSequenceClassification")
    return public_class(classifier).from_pretrained(str(folder), base=base)


def _folder(text: str) -> Path:
    if not text:
        raise typer.BadParameter("it is empty, which would be this folder; expected a name.")
    return Path(text)


Base = Annotated[str, Argument(help="The base: a hub id or a folder.")]
Adapters = Annotated[list[str], Option("--adapter", "-a", help="NAME=FOLDER or NAME=HUB_ID, each.")]
Mismatch = Annotated[bool, Option("--allow-base-mismatch", help="Adapters may name another base.")]
Classifier = Annotated[bool, Option("--classifier", help="The base is a sequence classifier.")]
Checkpoint = Annotated[Path, Argument(help="A folder written by save_pretrained or compose.")]
Out = Annotated[
    Path, Option("--out", "-o", parser=_folder, metavar="PATH", help="The folder to write.")
]
Weights = Annotated[list[str], Option("--weight", "-w", help="EXPERT=NUMBER, for each expert.")]


@app.command(epilog="Example: moelora check my-base -a math=adapters/math -a code=adapters/code")
def check(
    base: Base,
    adapter: Adapters,
    allow_base_mismatch: Mismatch = False,
    classifier: Classifier = False,
) -> None:
    """List all that is wrong with a set of adapters. Exit status 1 where anything is."""
    from moelora.adapters.preflight import COLUMNS, preflight

    sources = _pairs(adapter)
    auto_class = public_class(classifier).auto_class
    with busy(f"reading {len(sources)} adapters"):
        checked = preflight(
            base, sources, allow_base_mismatch=allow_base_mismatch, auto_class=auto_class
        )
    table = Table(*COLUMNS)
    for row in checked.rows():
        table.add_row(*row)
    out.print(table)
    if not checked.ok:
        raise typer.Exit(1)


@app.command(
    epilog="Example: moelora compose my-base -a math=adapters/math -a code=adapters/code -o mixture"
)
def compose(
    base: Base,
    adapter: Adapters,
    out_folder: Out,
    router: Annotated[str | None, Option(help="Else top_k, or as --router-init needs.")] = None,
    router_option: Annotated[list[str] | None, Option(help="NAME=VALUE of its settings.")] = None,
    router_init: Annotated[str, Option(help="random, or arrow (from the weights).")] = "random",
    top_k: Annotated[int | None, Option("--top-k", "-k", help="Experts; else 2, or all.")] = None,
    routing_level: Annotated[str, Option(help="token or sequence.")] = "token",
    router_scope: Annotated[str, Option(help="projection, site, layer or model.")] = "site",
    split: Annotated[str | None, Option(help="Of one adapter several: copy or svd.")] = None,
    experts: Annotated[int | None, Option(help="How many, with --split.")] = None,
    allow_base_mismatch: Mismatch = False,
    classifier: Classifier = False,
) -> None:
    """Make one mixture of adapters, and save it (experts and routers, not the base)."""
    from moelora.config import MoeLoraConfig

    sources: list[tuple[str, Any]] = _pairs(adapter)
    if (split, experts) != (None, None):
        sources = _parts(sources, split, experts)
    options = {name: _value(text) for name, text in _pairs(router_option or [])}
    slots: Any = 1 if top_k is None and len(sources) == 1 else top_k
    with busy(f"composing {len(sources)} adapters"):
        config = MoeLoraConfig(
            num_experts=len(sources),
            num_experts_per_tok=slots,
            router=router or ("arrow" if router_init == "arrow" else "top_k"),
            router_options=options,
            routing_level=routing_level,
            router_scope=router_scope,
        )
        model = public_class(classifier).from_adapters(
            base, sources, config, router_init=router_init, allow_base_mismatch=allow_base_mismatch
        )
        model.save_pretrained(out_folder)
    names = ", ".join(name for name, _ in sources)
    out.print(f"{len(sources)} experts in {out_folder}: {names}")


@app.command(epilog="Example: moelora info mixture")
def info(checkpoint: Checkpoint) -> None:
    """Say what a checkpoint holds, without its base."""
    from moelora.checkpoint.card import alphas_in_words, ranks_in_words

    tensors, config, _ = read_checkpoint(checkpoint)
    sites = config.sites or []
    widths = _widths(tensors, sites, config.share_lora_A)
    title = f"{checkpoint}: {config.num_experts} experts"
    table = Table("expert", "rank", "alpha", "parameters", title=title)
    words = zip(config.expert_names, ranks_in_words(config), alphas_in_words(config), strict=True)
    for e, own in enumerate(words):
        parameters = sum(config.ranks_of(linear)[e] * width for linear, width in widths.items())
        table.add_row(*own, f"{parameters:,}")
    out.print(table)
    if config.num_shared_experts:
        out.print(f"on every token: {', '.join(config.shared_expert_names)}")
    if config.share_lora_A:
        rows = sum(t.numel() for key, t in tensors.items() if key.endswith(".lora_A.weight"))
        out.print(f"shared by all experts: A, {rows:,} parameters")
    out.print(f"base: {config.base_model_name_or_path} ({config.base_architecture})")
    out.print(
        f"router: {config.router}, top {config.num_experts_per_tok}, {config.routing_level} level, "
        f"scope {config.router_scope}; {len(widths)} linears at {len(sites)} sites"
    )


@app.command(epilog="Example: moelora export mixture math -o adapters/math-again")
def export(
    checkpoint: Checkpoint,
    expert: Annotated[str, Argument(help="The expert's name.")],
    out_folder: Out,
    base: OtherBase = None,
    overwrite: Overwrite = False,
) -> None:
    """Write one expert as a stock PEFT LoRA folder."""
    with busy(f"exporting {expert}"):
        load(checkpoint, base).export_expert(expert, out_folder, overwrite=overwrite)
    out.print(f"{expert} in {out_folder}")


@app.command(epilog="Example: moelora merge mixture -w math=0.7 -w code=0.3 -o merged --rank 16")
def merge(
    checkpoint: Checkpoint,
    weight: Weights,
    out_folder: Out,
    rank: Annotated[int | None, Option(help="Compress to this rank by SVD; else exact.")] = None,
    recipe: Annotated[str, Option(help="How the experts' changes become one.")] = "linear",
    density: Annotated[float | None, Option(help="Kept by ties, dare_…, breadcrumbs.")] = None,
    seed: Annotated[int | None, Option(help="Of dare_…: what is dropped.")] = None,
    base: OtherBase = None,
    overwrite: Overwrite = False,
) -> None:
    """Write a fixed mixture of experts as one stock PEFT LoRA folder."""
    weights = {name: _number(name, value) for name, value in _pairs(weight)}
    options = {"rank": rank, "recipe": recipe, "density": density, "seed": seed}
    given = {name: value for name, value in options.items() if value is not None}
    with busy("merging"):
        model = load(checkpoint, base)
        report = model.export_merged(weights, out_folder, overwrite=overwrite, **given)
    out.print(f"{' + '.join(f'{w:g}·{name}' for name, w in weights.items())} in {out_folder}")
    out.print(str(report))


@app.command(epilog="Example: moelora route --model mixture < prompts.jsonl > routed.jsonl")
def route(
    model: Annotated[Path, Option("--model", "-m", help="A folder of a saved mixture.")],
    base: OtherBase = None,
    input_file: Annotated[Path | None, Option("--input", "-i", help="Else standard input.")] = None,
    output_file: Annotated[
        Path | None, Option("--output", "-o", help="Else it is printed.")
    ] = None,
    batch_size: Annotated[int, Option(min=1, help="Lines read before they are answered.")] = 16,
    field: Annotated[str | None, Option(help="Else prompt, instruction or messages.")] = None,
    top: Annotated[int | None, Option(min=1, help="Show the N most probable; else all.")] = None,
    overwrite: Overwrite = False,
) -> None:
    """Say which expert each prompt needs, for an engine that serves them.

    A line in is a JSON object with a prompt (a text, or chat messages), or a string; a line out has
    "expert", "probabilities" and the line's "id", or "error". One line out for each line in, in
    order, batch by batch. Exit status 1 where any line could not be routed.
    """
    from moelora.serving import load_tokenizer, route_lines

    failed = 0
    total = 0
    with _opened(input_file, "rb", sys.stdin) as lines:
        if output_file and output_file.exists():
            if input_file and output_file.samefile(input_file):
                raise ValueError(f"{output_file} is the input too: choose another --output.")
            if not overwrite:
                raise ValueError(f"{output_file} exists: choose another, or pass --overwrite.")
        with busy("loading"):
            loaded = load(model, base)
            tokenizer = load_tokenizer(loaded, model)
        with _opened(output_file, "w", sys.stdout) as to:
            for answers in route_lines(loaded, tokenizer, lines, batch_size, field, top):
                to.write("".join(json.dumps(answer) + "\n" for answer in answers))
                to.flush()
                errors = [answer["error"] for answer in answers if "error" in answer]
                for error in errors:
                    err.print(error)
                failed += len(errors)
                total += len(answers)
    if failed:
        err.print(f"{failed} of {total} lines could not be routed.")
        raise typer.Exit(1)


def _opened(path: Path | None, mode: str, standard: Any) -> AbstractContextManager[Any]:
    """The file, or where there is none a standard stream, which stays open."""
    if path is not None:
        return path.open(mode, encoding=None if "b" in mode else "utf-8")
    if standard is None:
        raise ValueError("The standard stream is closed: pass --input and --output.")
    return nullcontext(standard.buffer if "b" in mode else standard)


def _pairs(words: list[str]) -> list[tuple[str, str]]:
    """NAME=VALUE words, split; a ValueError where one is not of this form."""
    pairs = [(name, value) for name, _, value in (word.partition("=") for word in words)]
    for word, pair in zip(words, pairs):
        if not all(pair):
            raise ValueError(f"{word!r} is not NAME=VALUE, for example math=adapters/math.")
    return pairs


def _parts(
    sources: list[tuple[str, Any]], split: str | None, experts: int | None
) -> list[tuple[str, Any]]:
    """One adapter as so many, by names with numbers."""
    from moelora.adapters.splitting import split_adapter

    if len(sources) != 1 or split is None or experts is None:
        raise ValueError(
            f"--split makes several experts of one adapter, and {len(sources)} came: pass one -a, "
            "--split copy or svd, and --experts."
        )
    ((name, source),) = sources
    return list(split_adapter(source, [f"{name}_{e}" for e in range(experts)], split).items())


def _value(text: str) -> Any:
    """A setting's value: JSON where it is that, else a text."""
    with suppress(ValueError, RecursionError):
        return json.loads(text)
    return text


def _widths(
    tensors: Mapping[str, Any], sites: list[list[str]], share_lora_A: bool
) -> dict[str, int]:
    """d_in + d_out of each adapted linear, or d_out where A is no expert's own, from the experts'
    own tensors: a quantised base's weights have other shapes.
    """
    from moelora.placement import site_name

    # Without what says where in the model a site is, and with its - for all dots.
    shapes = {
        re.sub(r"moelora\.(outside\.)?sites\.", "", key).replace(".", "-"): tensor.shape
        for key, tensor in tensors.items()
    }
    widths = {}
    for site in sites:
        prefix = site_name(site[0]).replace(".", "-")
        for i, linear in enumerate(site):
            A = shapes.get(f"{prefix}-lora_A-weight")
            B = shapes.get(f"{prefix}-lora_B-{i}-weight")
            if A is None or B is None:
                raise ValueError(f"The checkpoint lacks the experts of {linear}: copy it again.")
            widths[linear] = B[-1] + (0 if share_lora_A else A[-1])
    return widths


def _number(name: str, value: str) -> float:
    try:
        return float(value)
    except ValueError:
        raise ValueError(f"The weight of {name!r} is {value!r}, expected a number.") from None


# The entry point of the console script.
main = app
