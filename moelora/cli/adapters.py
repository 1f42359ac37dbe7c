"""The commands that make a mixture of adapters: check and compose."""

from __future__ import annotations

import json
from contextlib import suppress
from typing import Annotated, Any

import typer
from rich.table import Table

from .console import Out, app, busy, out, pairs, public_class

Base = Annotated[str, typer.Argument(help="The base: a hub id or a folder.")]
Adapters = Annotated[
    list[str],
    typer.Option("--adapter", "-a", help="NAME=FOLDER or NAME=HUB_ID; once for each adapter."),
]
Mismatch = Annotated[
    bool, typer.Option("--allow-base-mismatch", help="The adapters may name another base.")
]
Classifier = Annotated[
    bool, typer.Option("--classifier", help="The base is a sequence classifier.")
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

    sources = pairs(adapter)
    with busy(f"reading {len(sources)} adapters"):
        checked = preflight(
            base,
            sources,
            allow_base_mismatch=allow_base_mismatch,
            auto_class=public_class(classifier).auto_class,
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
        str | None,
        typer.Option(help="The kind of router; else top_k, or what --router-init needs."),
    ] = None,
    router_option: Annotated[
        list[str] | None, typer.Option(help="NAME=VALUE of a setting that the router takes.")
    ] = None,
    router_init: Annotated[
        str, typer.Option(help="random, or arrow (from the adapters' weights).")
    ] = "random",
    experts_per_token: Annotated[
        int | None, typer.Option("--top-k", "-k", help="Experts that a token chooses; else 2.")
    ] = None,
    routing_level: Annotated[str, typer.Option(help="token or sequence.")] = "token",
    router_scope: Annotated[str, typer.Option(help="projection, site, layer or model.")] = "site",
    allow_base_mismatch: Mismatch = False,
    classifier: Classifier = False,
) -> None:
    """Make one mixture of adapters, and save it (experts and routers, not the base)."""
    from ..config import MoeLoraConfig

    sources = pairs(adapter)
    options = {name: _value(text) for name, text in pairs(router_option or [])}
    chosen = min(2, len(sources)) if experts_per_token is None else experts_per_token
    with busy(f"composing {len(sources)} adapters"):
        config = MoeLoraConfig(
            num_experts=len(sources),
            num_experts_per_tok=chosen,
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


def _value(text: str) -> Any:
    """A setting's value: JSON where it is that, else a text."""
    with suppress(ValueError, RecursionError):
        return json.loads(text)
    return text
