"""Lines of JSON: prompts in, and for each line one answer out, in order."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from typing import Any, TextIO

from ..core.model import MixtureModel
from ..serving import context_length, prompt_ids, route_ids
from ..validation import check_integer

# Where a line's prompt may be, in this order, unless the caller names the field.
FIELDS = ("prompt", "instruction", "messages")


def route_lines(
    model: MixtureModel,
    tokenizer: Any,
    lines: Iterable[str | bytes],
    batch_size: int = 16,
    field: str | None = None,
    top: int | None = None,
) -> Iterator[list[dict[str, Any]]]:
    """Answers to lines of JSON, batch by batch: one for each line, in their order.

    An answer has "expert", "probabilities" and the line's "id", where it has one; or "error", which
    names the line.

    Args:
        model: a model with a mixture inside.
        tokenizer: the base's tokenizer.
        lines: an object with a prompt, or a string, in each.
        batch_size: how many lines are read before they are answered.
        field: where an object's prompt is; None for the first of `FIELDS` that it has.
        top: how many of the most probable choices are shown; None for all.

    Raises:
        ValueError, TypeError: batch_size or top is not a number from 1 on.
    """
    check_integer("batch_size", batch_size, 1)
    if top is not None:
        check_integer("top", top, 1)
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


def write_answers(
    batches: Iterable[list[dict[str, Any]]], output: TextIO, report: Callable[[str], Any]
) -> tuple[int, int]:
    """Write `route_lines`' answers as lines of JSON, flushed batch by batch, and report each error.

    Returns how many answers are errors, and how many there are.
    """
    failed = total = 0
    for answers in batches:
        output.write("".join(json.dumps(answer) + "\n" for answer in answers))
        output.flush()
        errors = [answer["error"] for answer in answers if "error" in answer]
        for error in errors:
            report(error)
        failed += len(errors)
        total += len(answers)
    return failed, total


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
    """The prompt in a line's content."""
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
