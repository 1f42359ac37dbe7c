"""The commands that make a mixture of adapters (check, compose), and those that read a saved one
(info, export, merge).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table
from typer import Argument, Option

from .console import OtherBase, Overwrite, app, busy, load, out, public_class, read_checkpoint


def _folder(text: str) -> Path:
    if not text:
        raise typer.BadParameter("it is empty, which would be this folder; expected a name.")
    return Path(text)


Base = Annotated[str, Argument(help="The base: a hub id or a folder.")]
Adapters = Annotated[
    list[str], Option("--adapter", "-a", help="NAME=FOLDER or NAME=HUB_ID; once for each adapter.")
]
Mismatch = Annotated[
    bool, Option("--allow-base-mismatch", help="The adapters may name another base.")
]
Classifier = Annotated[bool, Option("--classifier", help="The base is a sequence classifier.")]
Checkpoint = Annotated[Path, Argument(help="A folder written by save_pretrained or compose.")]
Out = Annotated[
    Path, Option("--out", "-o", parser=_folder, metavar="PATH", help="The folder to write.")
]
Weights = Annotated[
    list[str], Option("--weight", "-w", help="EXPERT=NUMBER; once for each expert of the merge.")
]


@app.command(epilog="Example: moelora check my-base -a math=adapters/math -a code=adapters/code")
def check(
    base: Base,
    adapter: Adapters,
    allow_base_mismatch: Mismatch = False,
    classifier: Classifier = False,
) -> None:
    """List all that is wrong with a set of adapters. Exit status 1 where anything is."""
    from ..adapters.preflight import COLUMNS, preflight

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
    router: Annotated[
        str | None, Option(help="The kind of router; else top_k, or what --router-init needs.")
    ] = None,
    router_option: Annotated[list[str] | None, Option(help="NAME=VALUE of its settings.")] = None,
    router_init: Annotated[str, Option(help="random, or arrow (from the weights).")] = "random",
    top_k: Annotated[int | None, Option("--top-k", "-k", help="Experts a token; else 2.")] = None,
    routing_level: Annotated[str, Option(help="token or sequence.")] = "token",
    router_scope: Annotated[str, Option(help="projection, site, layer or model.")] = "site",
    allow_base_mismatch: Mismatch = False,
    classifier: Classifier = False,
) -> None:
    """Make one mixture of adapters, and save it (experts and routers, not the base)."""
    from ..config import MoeLoraConfig

    sources = _pairs(adapter)
    options = {name: _value(text) for name, text in _pairs(router_option or [])}
    with busy(f"composing {len(sources)} adapters"):
        config = MoeLoraConfig(
            num_experts=len(sources),
            num_experts_per_tok=min(2, len(sources)) if top_k is None else top_k,
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
    tensors, config, _ = read_checkpoint(checkpoint)
    sites = config.sites or []
    widths = _widths(tensors, sites)
    title = f"{checkpoint}: {config.num_experts} experts"
    table = Table("expert", "rank", "alpha", "parameters", title=title)
    for e, name in enumerate(config.expert_names):
        parameters = sum(config.ranks_of(linear)[e] * width for linear, width in widths.items())
        rank = config.ranks[e]
        table.add_row(name, str(rank), f"{config.scaling[e] * rank:g}", f"{parameters:,}")
    out.print(table)
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
    density: Annotated[
        float | None, Option(help="Of ties, dare_… and breadcrumbs: the part kept.")
    ] = None,
    seed: Annotated[int | None, Option(help="Of dare_…: what is dropped.")] = None,
    base: OtherBase = None,
    overwrite: Overwrite = False,
) -> None:
    """Write a fixed mixture of experts as one stock PEFT LoRA folder."""
    weights = {name: _number(name, value) for name, value in _pairs(weight)}
    given = {"density": density, "seed": seed}
    with busy("merging"):
        report = load(checkpoint, base).export_merged(
            weights,
            out_folder,
            rank=rank,
            recipe=recipe,
            overwrite=overwrite,
            **{name: value for name, value in given.items() if value is not None},
        )
    out.print(f"{' + '.join(f'{w:g}·{name}' for name, w in weights.items())} in {out_folder}")
    out.print(str(report))


def _pairs(words: list[str]) -> list[tuple[str, str]]:
    """NAME=VALUE words, split; a ValueError where one is not of this form."""
    split = []
    for word in words:
        name, _, value = word.partition("=")
        if not (name and value):
            raise ValueError(f"{word!r} is not NAME=VALUE, for example math=adapters/math.")
        split.append((name, value))
    return split


def _value(text: str) -> Any:
    """A setting's value: JSON where it is that, else a text."""
    with suppress(ValueError, RecursionError):
        return json.loads(text)
    return text


def _widths(tensors: Mapping[str, Any], sites: list[list[str]]) -> dict[str, int]:
    """d_in + d_out of each adapted linear, from the experts' own tensors: a quantised base's
    weights have other shapes.
    """
    # Without what says where in the model a site is, and with its - for all dots.
    shapes = {
        re.sub(r"moelora\.(outside\.)?sites\.", "", key).replace(".", "-"): tensor.shape
        for key, tensor in tensors.items()
    }
    widths = {}
    for site in sites:
        prefix = site[0].replace(".", "-")
        for i, linear in enumerate(site):
            try:
                A = shapes[f"{prefix}-lora_A-weight"]
                B = shapes[f"{prefix}-lora_B-{i}-weight"]
            except KeyError:
                raise ValueError(
                    f"The checkpoint lacks the experts of {linear}: copy it again."
                ) from None
            widths[linear] = A[-1] + B[-1]
    return widths


def _number(name: str, value: str) -> float:
    try:
        return float(value)
    except ValueError:
        raise ValueError(f"The weight of {name!r} is {value!r}, expected a number.") from None
