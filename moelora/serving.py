"""Routing for other engines: prompts in, expert names with their probabilities out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from .core.model import MixtureModel, evaluating
from .training.collator import padded_batch
from .validation import check_integer

# What tokenizers give as their length where they know of none is far beyond.
LONGEST = 10**7

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


def context_length(model: MixtureModel, tokenizer: Any) -> int | None:
    """How many tokens the base and the tokenizer allow a prompt; None where neither says."""
    config = model.config.get_text_config()
    named = [getattr(config, name, None) for name in ("max_position_embeddings", "n_positions")]
    limits = [
        n for n in (*named, tokenizer.model_max_length) if isinstance(n, int) and 0 < n < LONGEST
    ]
    return min(limits, default=None)


def prompt_ids(prompt: Prompt, tokenizer: Any, limit: int | None) -> list[int]:
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
    if limit is not None and len(ids) > limit:
        raise ValueError(
            f"The prompt has {len(ids)} tokens, and the context holds {limit}: shorten it, or "
            "route by its beginning."
        )
    return ids


def _in_template(messages: Any, tokenizer: Any) -> str:
    if not isinstance(messages, Sequence) or not all(isinstance(m, Mapping) for m in messages):
        raise TypeError(
            f"The prompt is a {type(messages).__name__}; expected a text, or messages such as "
            '[{"role": "user", "content": "…"}].'
        )
    for message in messages:
        if not isinstance(message.get("role"), str) or not {"content", "tool_calls"} & set(message):
            raise ValueError(
                'A message has "role" and "content"; this one has '
                f"{', '.join(message) or 'nothing'}."
            )
    if not any(str(message.get("content") or "").strip() for message in messages):
        raise ValueError("The messages are empty.")
    if tokenizer.chat_template is None:
        raise ValueError(
            "The tokenizer has no chat template for messages: give the prompt as a text."
        )
    try:
        return tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=True
        )
    except Exception as error:
        # A template is a program of the tokenizer's maker, and fails as it likes.
        raise ValueError(f"The tokenizer's chat template refuses the messages: {error}") from error


def load_tokenizer(model: MixtureModel, checkpoint: str | Path) -> Any:
    """The tokenizer of a loaded checkpoint: the one saved with it, else its base's.

    Raises:
        ValueError: there is none.
    """
    base = model.config.name_or_path
    places = (str(checkpoint), base, model.moelora_config.base_model_name_or_path)
    for place in filter(None, places):
        if not Path(place).is_dir() or (Path(place) / "tokenizer_config.json").is_file():
            with suppress(OSError, ValueError):
                return AutoTokenizer.from_pretrained(place)
    raise ValueError(
        f"There is no tokenizer in {checkpoint}, nor with its base ({base}): save the base's into "
        "one of them with tokenizer.save_pretrained(…)."
    )
