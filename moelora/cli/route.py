"""The command that says which expert each prompt needs: a line of JSON in, a line of JSON out."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import typer
from typer import Option

from ..validation import check_integer
from .console import OtherBase, Overwrite, app, busy, err, load

# Where a line's prompt may be, in this order, unless the caller names the field.
FIELDS = ("prompt", "instruction", "messages")


@app.command(epilog="Example: moelora route --model mixture < prompts.jsonl > routed.jsonl")
def route(
    model: Annotated[Path, Option("--model", "-m", help="A folder of a saved mixture.")],
    base: OtherBase = None,
    input_file: Annotated[Path | None, Option("--input", "-i", help="Else standard input.")] = None,
    output_file: Annotated[
        Path | None, Option("--output", "-o", help="Else standard output.")
    ] = None,
    batch_size: Annotated[int, Option(min=1, help="Lines read before they are answered.")] = 16,
    field: Annotated[
        str | None, Option(help="Where the prompt is; else prompt, instruction or messages.")
    ] = None,
    top: Annotated[int | None, Option(min=1, help="Show the N most probable; else all.")] = None,
    overwrite: Overwrite = False,
) -> None:
    """Say which expert each prompt needs, for an engine that serves them.

    A line in is a JSON object with a prompt (a text, or chat messages), or a string; a line out has
    "expert", "probabilities" and the line's "id", or "error". One line out for each line in, in
    order, batch by batch. Exit status 1 where any line could not be routed.
    """
    from ..serving import load_tokenizer

    failed = 0
    total = 0
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


def route_lines(
    model: Any,
    tokenizer: Any,
    lines: Iterable[str | bytes],
    batch_size: int = 16,
    field: str | None = None,
    top: int | None = None,
) -> Iterator[list[dict[str, Any]]]:
    """Answers to lines of JSON, batch by batch, as `route` writes them."""
    from ..serving import context_length, prompt_ids, route_ids

    check_integer("batch_size", batch_size, 1)
    check_integer("top", 1 if top is None else top, 1)
    limit = context_length(model, tokenizer)
    numbered = enumerate(lines, start=1)
    while batch := list(islice(numbered, batch_size)):
        answers: list[dict[str, Any]] = [{} for _ in batch]
        rows: dict[int, list[int]] = {}
        for i, (number, line) in enumerate(batch):
            try:
                content = _json(line)
                if isinstance(content, Mapping) and "id" in content:
                    answers[i]["id"] = content["id"]
                rows[i] = prompt_ids(_prompt(content, field), tokenizer, limit)
            except (ValueError, TypeError) as error:
                answers[i]["error"] = f"line {number}: {error}"
        for i, routed in zip(rows, route_ids(model, list(rows.values()))):
            shown = list(routed.probabilities.items())[:top]
            answers[i]["expert"] = routed.expert
            answers[i]["probabilities"] = {name: round(p, 6) for name, p in shown}
        yield answers


def _json(line: str | bytes) -> Any:
    if isinstance(line, bytes):
        # A UnicodeDecodeError is a ValueError.
        line = line.decode("utf-8-sig")
    if not line.strip():
        raise ValueError("It is empty; expected a JSON object or string.")
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"It is not valid JSON ({error.msg} at column {error.colno}).") from error
    except RecursionError as error:
        raise ValueError("It is nested too deeply.") from error


def _prompt(content: Any, field: str | None) -> Any:
    if isinstance(content, str):
        return content
    if not isinstance(content, Mapping):
        raise TypeError(f"It is a {type(content).__name__}; expected a JSON object or string.")
    wanted = FIELDS if field is None else (field,)
    for name in wanted:
        if name in content:
            return content[name]
    names = " or ".join(f'"{name}"' for name in wanted)
    raise ValueError(
        f"It has no field {names}; its fields are: {', '.join(map(str, content)) or 'none'}."
    )


def _opened(path: Path | None, mode: str, standard: Any) -> AbstractContextManager[Any]:
    """The file, or where there is none a standard stream, which stays open."""
    if path is not None:
        return path.open(mode, encoding=None if "b" in mode else "utf-8")
    if standard is None:
        raise ValueError("The standard stream is closed: pass --input and --output.")
    return nullcontext(standard.buffer if "b" in mode else standard)
