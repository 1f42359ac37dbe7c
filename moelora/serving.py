"""Routing for other engines: prompts in, expert names with their probabilities out."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from .core.model import MixtureModel, evaluating
from .training.datasets import padded_batch
from .validation import check_integer

# Of a prompt in tokens. What tokenizers give where they know of no limit is far beyond.
LONGEST = 10**7
# Where a line's prompt may be, in this order, unless the caller names the field.
FIELDS = ("prompt", "instruction", "messages")

Prompt = str | Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class RoutedPrompt:
    """Which expert a prompt needs.

    Attributes:
        expert: the most probable choice.
        probabilities: the probability of every choice, the largest first.
    """

    expert: str
    probabilities: dict[str, float]


def route_prompts(
    model: MixtureModel, tokenizer: Any, prompts: Iterable[Prompt], batch_size: int = 16
) -> list[RoutedPrompt]:
    """Which expert each prompt needs.

    Args:
        model: a model with a mixture inside.
        tokenizer: the base's tokenizer.
        prompts: texts, or chat messages for the tokenizer's template.
        batch_size: how many prompts are routed together.

    Raises:
        ValueError, TypeError: a prompt that is empty, too long, or neither a text nor messages; all
            are checked before any is routed.
    """
    check_integer("batch_size", batch_size, 1)
    limit = context_length(model, tokenizer)
    rows = []
    for number, prompt in enumerate(prompts):
        try:
            rows.append(prompt_ids(prompt, tokenizer, limit))
        except (ValueError, TypeError) as error:
            kind = TypeError if isinstance(error, TypeError) else ValueError
            raise kind(f"prompts[{number}]: {error}") from error
    batches = (rows[i : i + batch_size] for i in range(0, len(rows), batch_size))
    return [answer for batch in batches for answer in route_ids(model, batch)]


def route_lines(
    model: MixtureModel,
    tokenizer: Any,
    lines: Iterable[str | bytes],
    batch_size: int = 16,
    field: str | None = None,
    top: int | None = None,
) -> Iterator[list[dict[str, Any]]]:
    """Answers to lines of JSON, batch by batch, as `moelora route` writes them.

    Args:
        model, tokenizer, batch_size: as in `route_prompts`.
        lines: each a JSON object with a prompt, or a string.
        field: where an object's prompt is; by default in one of `FIELDS`.
        top: how many probabilities to show, the largest first; None for all.
    """
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


def route_ids(model: MixtureModel, rows: Sequence[list[int]]) -> list[RoutedPrompt]:
    """Which expert each row of token ids needs; they are one batch."""
    if not rows:
        return []
    # On the right, whatever the tokenizer prefers: every prompt begins at position 0, as it does
    # alone. The mask hides the padding, so that any id will do.
    batch = padded_batch([{"input_ids": row} for row in rows], model.device)
    with evaluating(model):
        report = model.route(**batch)  # type: ignore[attr-defined]
    answers = []
    for expert, row in zip(report.top_experts(), report.probabilities.tolist()):
        falling = sorted(zip(report.choice_names, row), key=lambda pair: -pair[1])
        answers.append(RoutedPrompt(expert, dict(falling)))
    return answers


def context_length(model: MixtureModel, tokenizer: Any) -> int:
    """How many tokens the base and the tokenizer allow a prompt; `LONGEST` where neither says."""
    config = model.config.get_text_config()
    named = [getattr(config, name, None) for name in ("max_position_embeddings", "n_positions")]
    limits = (*named, tokenizer.model_max_length, LONGEST)
    return min(limit for limit in limits if isinstance(limit, int) and limit > 0)


def prompt_ids(prompt: Prompt, tokenizer: Any, limit: int) -> list[int]:
    """At most `limit` token ids of a text, or of messages in the chat template with the answer's
    beginning.

    Raises:
        ValueError: it is empty, longer than `limit`, or not what the template takes.
        TypeError: it is neither a text nor messages.
    """
    chat = not isinstance(prompt, str)
    text = _in_template(prompt, tokenizer) if chat else prompt
    if not text.strip():
        raise ValueError("The prompt is empty.")
    # Half of a surrogate pair, which JSON can hold, is a UnicodeEncodeError: a ValueError.
    text.encode()
    # A template writes the special tokens itself.
    ids = tokenizer(text, add_special_tokens=not chat, verbose=False)["input_ids"]
    if not ids:
        raise ValueError("The prompt has no tokens.")
    if len(ids) > limit:
        raise ValueError(
            f"The prompt has {len(ids)} tokens, and the context holds {limit}: shorten it."
        )
    return ids


def _in_template(messages: Any, tokenizer: Any) -> str:
    if not isinstance(messages, Sequence) or not all(isinstance(m, Mapping) for m in messages):
        raise TypeError(
            f"The prompt is a {type(messages).__name__}; expected a text, or messages with roles."
        )
    for message in messages:
        if not isinstance(message.get("role"), str) or not {"content", "tool_calls"} & set(message):
            has = ", ".join(message) or "nothing"
            raise ValueError(f'A message has "role" and "content"; this one has {has}.')
    if not any(str(message.get("content") or "").strip() for message in messages):
        raise ValueError("The messages are empty.")
    if tokenizer.chat_template is None:
        raise ValueError("The tokenizer has no chat template: give the prompt as a text.")
    messages = list(messages)
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except Exception as error:
        # A template is a program of the tokenizer's maker, and fails as it likes.
        raise ValueError(f"The tokenizer's chat template refuses the messages: {error}") from error


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
    raise ValueError(f"It has no field {names}; its fields are: {', '.join(content) or 'none'}.")


def load_tokenizer(model: MixtureModel, checkpoint: str | Path) -> Any:
    """The tokenizer of a loaded checkpoint: the one saved with it, else its base's.

    Raises:
        ValueError: there is none.
    """
    base = model.moelora_config.base_model_name_or_path
    places = (str(checkpoint), base)
    for place in filter(None, places):
        if not Path(place).is_dir() or (Path(place) / "tokenizer_config.json").is_file():
            with suppress(OSError, ValueError):
                return AutoTokenizer.from_pretrained(place)
    raise ValueError(
        f"There is no tokenizer in {checkpoint}, nor with its base ({base}): put the base's there "
        "with tokenizer.save_pretrained(…)."
    )
