"""`Texts`: prompts with their targets as token ids, and whose expert each is."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..core.losses import IGNORE

PROMPTS, TARGETS = ("instruction", "prompt"), ("output", "completion")
# What tokenizers give as their length where they know of none is far beyond.
LONGEST = 10**6


class Texts(Dataset):
    """Rows for the stock `Trainer`: input_ids `[n]`, labels `[n]` (−100 on the prompt), and where
    there is a prompt router_mask `[n]` (True on it); with labels for the routers expert_targets,
    one number or `[n]`.
    """

    def __init__(self, rows: Sequence[dict[str, Tensor]]):
        self.rows = list(rows)

    @classmethod
    def of(
        cls,
        rows: Iterable[Mapping[str, Any] | str],
        tokenizer: Callable[..., Any],
        *,
        max_length: int | None = None,
        expert: int | None = None,
        join: str = "\n",
    ) -> Texts:
        """Tokenise rows: mappings with a prompt ("instruction" or "prompt") and its target
        ("output" or "completion"), or whole texts (strings, or mappings with "text"), whose every
        token takes a loss.

        join: what stands between prompt and target; it belongs to the target, so that a prompt's
        tokens are those that a router is given without any target. The target ends with the
        tokenizer's eos token. max_length: the most tokens that a row may have, by default the
        tokenizer's own limit. expert: the expert_targets of all rows.

        Raises:
            ValueError: a row without the fields, empty, or too long, by its number.
            TypeError: one text or mapping instead of rows of them.
        """
        limit = max_length
        if limit is None:
            known = getattr(tokenizer, "model_max_length", LONGEST)
            limit = known if isinstance(known, int) and known < LONGEST else None
        if isinstance(rows, (str, Mapping)):
            raise TypeError(
                f"rows is a {type(rows).__name__}; expected several rows, such as a list of them."
            )
        made = []
        for number, row in enumerate(rows):
            prompt, target = _parts(row, number)
            prompt_ids = [] if prompt is None else tokenizer(prompt, verbose=False)["input_ids"]
            target_ids = _target_ids(
                target, tokenizer, "" if prompt is None else join, bool(prompt_ids)
            )
            for part, ids in ((prompt, prompt_ids), (target, target_ids)):
                if part is not None and not ids:
                    raise ValueError(
                        f"Row {number} has no token in {part!r}: this tokenizer knows nothing of it."
                    )
            if limit is not None and len(prompt_ids) + len(target_ids) > limit:
                raise ValueError(
                    f"Row {number} has {len(prompt_ids)} tokens of prompt and {len(target_ids)} of target, more than "
                    f"max_length={limit}: shorten it, or leave it out."
                )
            made.append(_row(prompt_ids, target_ids))
        texts = cls(made)
        return texts if expert is None else texts.labelled(expert)

    @classmethod
    def joined(cls, parts: Iterable[Texts]) -> Texts:
        """The rows of all parts, one after another."""
        return cls([row for part in parts for row in part.rows])

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return dict(self.rows[index])

    def prompts(self) -> list[Tensor]:
        """The token ids of each row's prompt `[n]`; of a text without one all its tokens."""
        return [
            row["input_ids"][row["router_mask"]] if "router_mask" in row else row["input_ids"]
            for row in self.rows
        ]

    def labelled(self, expert: int | Sequence[int] | Tensor) -> Texts:
        """The same rows with expert_targets: one number for all, or one for each.

        Raises:
            ValueError: as many numbers as there are rows were expected.
        """
        numbers = [expert] * len(self) if isinstance(expert, int) else [int(e) for e in expert]
        if len(numbers) != len(self):
            raise ValueError(
                f"There are {len(numbers)} expert_targets for {len(self)} rows: give one for each."
            )
        return Texts(
            [{**row, "expert_targets": torch.tensor(e)} for row, e in zip(self.rows, numbers)]
        )

    def unlabelled(self) -> Texts:
        """The same rows without expert_targets."""
        return Texts([{k: v for k, v in row.items() if k != "expert_targets"} for row in self.rows])

    def subset(self, indices: Iterable[int]) -> Texts:
        """The rows with these numbers, in their order."""
        return Texts([self.rows[i] for i in indices])


def _parts(row: Any, number: int) -> tuple[str | None, str]:
    """The prompt, None for a whole text, and the target."""
    if isinstance(row, str):
        parts = {"text": row}
    elif not isinstance(row, Mapping):
        raise ValueError(f"Row {number} is a {type(row).__name__}; expected a mapping or a string.")
    elif "text" in row:
        parts = {"text": row["text"]}
    else:
        names = [next((n for n in wanted if n in row), None) for wanted in (PROMPTS, TARGETS)]
        if None in names:
            raise ValueError(
                f"Row {number} has the fields {sorted(row)}; expected one of {', '.join(PROMPTS)} with one of "
                f"{', '.join(TARGETS)}, or text."
            )
        parts = {"prompt": row[names[0]], "target": row[names[1]]}
    for what, part in parts.items():
        if not isinstance(part, str) or not part.strip():
            raise ValueError(
                f"Row {number} has an empty {what} ({part!r}): fill it in, or leave the row out."
            )
    return parts.get("prompt"), parts.get("target", parts.get("text", ""))


def _target_ids(
    target: str, tokenizer: Callable[..., Any], join: str, after_prompt: bool
) -> list[int]:
    # Special tokens at the beginning belong to the prompt, where there is one.
    ids = tokenizer(join + target, add_special_tokens=not after_prompt, verbose=False)["input_ids"]
    end = getattr(tokenizer, "eos_token_id", None)
    return [*ids, *([] if end is None or (ids and ids[-1] == end) else [end])]


def _row(prompt: list[int], target: list[int]) -> dict[str, Tensor]:
    row = {
        "input_ids": torch.tensor(prompt + target),
        "labels": torch.tensor([IGNORE] * len(prompt) + target),
    }
    if prompt:
        row["router_mask"] = torch.arange(len(prompt) + len(target)) < len(prompt)
    return row
