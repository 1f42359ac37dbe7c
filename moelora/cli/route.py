"""The command that says which expert each prompt needs."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from .console import OtherBase, app, busy, err, load


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
    from ..serving import load_tokenizer
    from .json_lines import route_lines, write_answers

    with _opened(input_file, "rb", sys.stdin) as lines:
        if output_file is not None and output_file.exists():
            if input_file is not None and output_file.samefile(input_file):
                raise ValueError(f"{output_file} is the input too: choose another --output.")
            if not overwrite:
                raise ValueError(
                    f"{output_file} exists: choose another --output, or pass --overwrite."
                )
        with busy("loading"):
            loaded = load(model, base)
            tokenizer = load_tokenizer(loaded, model)
        with _opened(output_file, "w", sys.stdout) as to:
            answers = route_lines(loaded, tokenizer, lines, batch_size, field, top)
            failed, total = write_answers(answers, to, err.print)
    if failed:
        err.print(f"{failed} of {total} lines could not be routed.")
        raise typer.Exit(1)


@contextmanager
def _opened(path: Path | None, mode: str, standard: Any) -> Iterator[Any]:
    """The file, or where there is none a standard stream, which stays open."""
    if path is not None:
        with open(path, mode, encoding=None if "b" in mode else "utf-8") as file:
            yield file
    elif standard is None:
        raise ValueError("The standard stream is closed: pass --input and --output.")
    else:
        yield standard.buffer if "b" in mode else standard
