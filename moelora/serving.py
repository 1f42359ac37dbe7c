"""Routing for other engines: prompts in, expert names with probabilities out, one answer for each
line.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TextIO

import torch
from transformers import AutoTokenizer

from .validation import check_integer

# Where a line's prompt may be, in this order, unless the caller names the field.
FIELDS = ("prompt", "instruction", "messages")
# What tokenizers give as their length where they know of none is far beyond.
LONGEST = 10**7

Prompt = str | Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class RoutedPrompt:
    """Which expert a prompt needs: the most probable choice, and the probability of every one,
    falling.
    """

    expert: str
    probabilities: dict[str, float]


def route_prompts(
    model: Any, tokenizer: Any, prompts: Iterable[Prompt], batch_size: int = 16
) -> list[RoutedPrompt]:
    """Which expert each prompt needs; a prompt is a text, or chat messages for the tokenizer's
    template.

    Raises:
        ValueError, TypeError: a prompt that is empty, too long, or neither; all are checked before
        any is routed.
    """
    check_integer("batch_size", batch_size, 1)
    rows, limit = [], context_length(model, tokenizer)
    for number, prompt in enumerate(prompts):
        try:
            rows.append(prompt_ids(prompt, tokenizer, limit))
        except (ValueError, TypeError) as error:
            kind = TypeError if isinstance(error, TypeError) else ValueError
            raise kind(f"prompts[{number}]: {error}") from error
    return [
        answer
        for batch in _batches(rows, batch_size)
        for answer in route_ids(model, batch, tokenizer)
    ]


def route_ids(model: Any, rows: Sequence[list[int]], tokenizer: Any) -> list[RoutedPrompt]:
    """Which expert each row of token ids needs; the rows are one batch."""
    if not rows:
        return []
    width = max(map(len, rows))
    pad = next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)
    # On the right, whatever the tokenizer prefers: every prompt begins at position 0, as it does
    # alone.
    ids = torch.tensor([row + [pad] * (width - len(row)) for row in rows], device=model.device)
    mask = torch.tensor(
        [[1] * len(row) + [0] * (width - len(row)) for row in rows], device=model.device
    )
    training = model.training
    model.eval()
    try:
        report = model.route(input_ids=ids, attention_mask=mask)
    finally:
        model.train(training)
    found = []
    for expert, row in zip(report.top_experts(), report.probabilities.tolist()):
        falling = sorted(zip(report.choice_names, row), key=lambda pair: -pair[1])
        found.append(RoutedPrompt(expert, dict(falling)))
    return found


def context_length(model: Any, tokenizer: Any) -> int | None:
    """How many tokens a prompt may have: what the base and the tokenizer allow, None where neither
    says.
    """
    config = model.config.get_text_config()
    named = [getattr(config, name, None) for name in ("max_position_embeddings", "n_positions")]
    limits = [
        n for n in (*named, tokenizer.model_max_length) if isinstance(n, int) and 0 < n < LONGEST
    ]
    return min(limits, default=None)


def prompt_ids(prompt: Prompt, tokenizer: Any, limit: int | None) -> list[int]:
    """The token ids of a text, or of chat messages in the tokenizer's template with the answer's
    beginning.

    Raises:
        ValueError: it is empty, longer than `limit`, or not what the template takes.
        TypeError: it is neither a text nor messages.
    """
    chat = not isinstance(prompt, str)
    text = _in_template(prompt, tokenizer) if chat else prompt
    if not text.strip():
        raise ValueError("The prompt is empty.")
    text.encode()  # Half of a surrogate pair, which JSON can hold, is a UnicodeEncodeError: a ValueError that says so.
    # A template writes the special tokens itself.
    ids = tokenizer(text, add_special_tokens=not chat, verbose=False)["input_ids"]
    if not ids:
        raise ValueError("The prompt has no tokens.")
    if limit is not None and len(ids) > limit:
        raise ValueError(
            f"The prompt has {len(ids)} tokens, and the context holds {limit}: shorten it, or route by its beginning."
        )
    return ids


def _in_template(messages: Any, tokenizer: Any) -> str:
    if not isinstance(messages, Sequence) or not all(isinstance(m, Mapping) for m in messages):
        raise TypeError(
            f"The prompt is a {type(messages).__name__}; expected a text, or messages such as "
            '[{"role": "user", "content": "…"}].'
        )
    if not messages:
        raise ValueError("The messages are empty.")
    if tokenizer.chat_template is None:
        raise ValueError(
            "The tokenizer has no chat template for messages: give the prompt as a text."
        )
    for message in messages:
        if not isinstance(message.get("role"), str) or not {"content", "tool_calls"} & set(message):
            raise ValueError(
                f'A message has "role" and "content"; this one has {", ".join(message) or "nothing"}.'
            )
    if not any(str(message.get("content") or "").strip() for message in messages):
        raise ValueError("The messages are empty.")
    try:
        return tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=True
        )
    except (
        Exception
    ) as error:  # A template is a program of the tokenizer's maker, and fails as it likes.
        raise ValueError(f"The tokenizer's chat template refuses the messages: {error}") from error


def route_lines(
    model: Any,
    tokenizer: Any,
    lines: Iterable[str | bytes],
    batch_size: int = 16,
    field: str | None = None,
    top: int | None = None,
) -> Iterator[list[dict[str, Any]]]:
    """Answers to lines of JSON, batch by batch: one for each line, in their order.

    A line is an object with its prompt under `field` (by default the first of `FIELDS` that it
    has), or a string. Its answer has "expert", "probabilities" (of the `top` most probable choices)
    and the line's "id", where it has one; or "error", which names the line.

    Raises:
        ValueError, TypeError: batch_size or top is no number from 1 on.
    """
    check_integer("batch_size", batch_size, 1)
    if top is not None:
        check_integer("top", top, 1)
    limit = context_length(model, tokenizer)
    for batch in _batches(enumerate(lines, start=1), batch_size):
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
        for i, routed in zip(rows, route_ids(model, list(rows.values()), tokenizer)):
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
        failed, total = failed + len(errors), total + len(answers)
    return failed, total


def _batches(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    rest = iter(items)
    while batch := list(islice(rest, size)):
        yield batch


def _json(line: str | bytes) -> Any:
    if isinstance(line, bytes):
        line = line.decode("utf-8-sig")  # A UnicodeDecodeError is a ValueError.
    if not line.strip():
        raise ValueError("It is empty; expected a JSON object or string.")
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"It is no valid JSON ({error.msg} at column {error.colno}).") from error
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


def load_tokenizer(model: Any, checkpoint: str | Path) -> Any:
    """The tokenizer of a loaded checkpoint: the one saved with it, else its base's.

    Raises:
        ValueError: there is none.
    """
    places = [
        str(checkpoint),
        model.config._name_or_path,
        model.moelora_config.base_model_name_or_path,
    ]
    for place in dict.fromkeys(filter(None, places)):
        if Path(place).is_dir() and not (Path(place) / "tokenizer_config.json").is_file():
            continue
        try:
            return AutoTokenizer.from_pretrained(place)
        except (OSError, ValueError):
            continue
    raise ValueError(
        f"There is no tokenizer in {checkpoint}, nor with its base ({model.config._name_or_path}): save the base's "
        "into one of them with tokenizer.save_pretrained(…)."
    )
