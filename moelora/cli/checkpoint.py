"""The commands that read a saved mixture: info, export and merge."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any

import typer
from rich.table import Table

from .console import Checkpoint, OtherBase, Out, app, busy, load, out, pairs, read_checkpoint

Weights = Annotated[
    list[str],
    typer.Option("--weight", "-w", help="EXPERT=NUMBER; once for each expert of the merge."),
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what is in the folder.")]


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
    expert: Annotated[str, typer.Argument(help="The expert's name.")],
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
    rank: Annotated[
        int | None, typer.Option(help="Compress to this rank by SVD; else exact.")
    ] = None,
    recipe: Annotated[str, typer.Option(help="How the experts' changes become one.")] = "linear",
    density: Annotated[
        float | None, typer.Option(help="Of ties, dare_… and breadcrumbs: the part kept.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of dare_…: what is dropped.")] = None,
    base: OtherBase = None,
    overwrite: Overwrite = False,
) -> None:
    """Write a fixed mixture of experts as one stock PEFT LoRA folder."""
    weights = {name: _number(name, value) for name, value in pairs(weight)}
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
