"""`Texts`: prompts with their targets as token ids, and whose expert each is."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..core.losses import IGNORE

# What each field of a row is; of two for the same part the later one counts.
FIELDS = {
    "text": "text",
    "prompt": "prompt",
    "instruction": "prompt",
    "completion": "target",
    "output": "target",
}


class Texts(Dataset):
    """Rows for the stock `Trainer`.

    A row has input_ids `[n]`, labels `[n]` (−100 on the prompt), where there is a prompt
    router_mask `[n]` (True on it), and perhaps labels for the routers, expert_targets: one number,
    or `[n]`.

    Args:
        rows: such rows.
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
        """Tokenise rows, each a prompt with its target, or a whole text, whose every token counts.

        Args:
            rows: mappings with a prompt ("instruction" or "prompt") and its target ("output" or
                "completion"); or whole texts, as strings or mappings with "text".
            tokenizer: the base's. Its eos token ends every row.
            max_length: the most tokens that a row may have; by default the tokenizer's own limit.
            expert: the expert_targets of all rows.
            join: what stands between prompt and target. It belongs to the target, so that a
                prompt's tokens are those that a router is given where there is no target.

        Raises:
            ValueError: a row without the fields, empty, or too long, by its number.
            TypeError: one text or mapping instead of rows of them.
        """
        if isinstance(rows, (str, Mapping)):
            raise TypeError(f"rows is a {type(rows).__name__}; expected a list of rows.")
        if max_length is None:
            max_length = getattr(tokenizer, "model_max_length", None) or sys.maxsize
        made = enumerate(rows)
        texts = cls([_tokenised(f"Row {i}", row, tokenizer, join, max_length) for i, row in made])
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
        """The same rows with expert_targets.

        Args:
            expert: one number for all rows, or one for each.

        Raises:
            ValueError: not as many numbers as there are rows.
        """
        numbers = [expert] * len(self) if isinstance(expert, int) else [int(e) for e in expert]
        if len(numbers) != len(self):
            raise ValueError(
                f"There are {len(numbers)} expert_targets for {len(self)} rows: give one for each."
            )
        targets = map(torch.tensor, numbers)
        return Texts([{**row, "expert_targets": e} for row, e in zip(self.rows, targets)])

    def unlabelled(self) -> Texts:
        """The same rows without expert_targets."""
        return self.without("expert_targets")

    def without(self, key: str) -> Texts:
        """The same rows without one of their keys.

        Args:
            key: which they may have or not.
        """
        return Texts([{k: v for k, v in row.items() if k != key} for row in self.rows])

    def subset(self, indices: Iterable[int]) -> Texts:
        """The rows with these numbers, in their order."""
        return Texts([self.rows[i] for i in indices])


def check_texts(name: str, texts: Any, may_be_empty: bool = False) -> None:
    """Raise unless `texts`, which the caller calls `name`, is a `Texts`, with a row or more."""
    if not isinstance(texts, Texts):
        raise TypeError(f"{name} is a {type(texts).__name__}; expected Texts: use Texts.of(…).")
    if not len(texts) and not may_be_empty:
        raise ValueError(f"{name} holds no texts: give one at least.")


def texts_of(name: str, data: Any) -> Texts:
    """The data of `name` as Texts: they themselves, or made of a dataset's rows.

    A row has input_ids `[n]`, and perhaps labels, router_mask and attention_mask `[n]`. Its prompt
    is its router_mask, else what comes before its first label. Padding is left out.
    """
    if isinstance(data, Texts):
        return data
    has_rows = hasattr(data, "__len__") and hasattr(data, "__getitem__")
    if isinstance(data, (str, Mapping)) or not has_rows:
        raise TypeError(
            f"The data of {name!r} is a {type(data).__name__}; expected Texts, which Texts.of(rows, "
            "tokenizer) makes, or a dataset with a length and input_ids."
        )
    return Texts([_dataset_row(f"Row {i} of {name!r}", data[i]) for i in range(len(data))])


def _dataset_row(place: str, row: Any) -> dict[str, Tensor]:
    if not isinstance(row, Mapping) or "input_ids" not in row:
        what = sorted(row) if isinstance(row, Mapping) else type(row).__name__
        raise ValueError(f"{place} has {what}; expected input_ids, and labels if they differ.")
    ids = torch.as_tensor(row["input_ids"])
    labels = torch.as_tensor(row.get("labels", ids))
    if labels.shape != ids.shape or labels.dim() != 1:
        raise ValueError(
            f"{place} has labels of shape {list(labels.shape)} and input_ids of shape "
            f"{list(ids.shape)}; expected [n] both."
        )
    attended = torch.as_tensor(row.get("attention_mask", torch.ones_like(ids))).bool()
    counted = labels != IGNORE
    prompt = (counted.cumsum(0) == 0) & attended
    tensors = {"input_ids": ids, "labels": labels}
    if "router_mask" in row:
        tensors["router_mask"] = torch.as_tensor(row["router_mask"]).bool()
    elif bool(counted.any()) and bool(prompt.any()):
        tensors["router_mask"] = prompt
    return {key: tensor[attended] for key, tensor in tensors.items()}


def _tokenised(
    place: str, row: Any, tokenizer: Callable[..., Any], join: str, limit: int
) -> dict[str, Tensor]:
    prompt, target = _prompt_and_target(place, row)
    prompt_ids = tokenizer(prompt, verbose=False)["input_ids"] if prompt else []
    # Special tokens at the beginning belong to the prompt, where there is one.
    joined = join + target if prompt else target
    target_ids = tokenizer(joined, add_special_tokens=not prompt_ids, verbose=False)["input_ids"]
    end = getattr(tokenizer, "eos_token_id", None)
    if end is not None and target_ids[-1:] != [end]:
        target_ids = [*target_ids, end]
    for part, ids in ((prompt, prompt_ids), (target, target_ids)):
        if part and not ids:
            raise ValueError(f"{place} has no token in {part!r}: the tokenizer does not know it.")
    before = len(prompt_ids)
    if before + len(target_ids) > limit:
        raise ValueError(
            f"{place} has {before} tokens of prompt and {len(target_ids)} of target, more than "
            f"max_length={limit}: shorten it, or leave it out."
        )
    labels = [IGNORE] * before + target_ids
    return _dataset_row(place, {"input_ids": prompt_ids + target_ids, "labels": labels})


def _prompt_and_target(place: str, row: Any) -> tuple[str, str]:
    """The prompt, empty for a whole text, and the target."""
    if isinstance(row, str):
        row = {"text": row}
    if not isinstance(row, Mapping):
        raise ValueError(f"{place} is a {type(row).__name__}; expected a mapping or a string.")
    parts = {part: row[field] for field, part in FIELDS.items() if field in row}
    if "text" in parts:
        parts = {"text": parts["text"]}
    elif len(parts) < 2:
        expected = "one of instruction, prompt with one of output, completion; or text"
        raise ValueError(f"{place} has the fields {sorted(row)}; expected {expected}.")
    for part, value in parts.items():
        if not isinstance(value, str) or not value.strip():
            raise ValueError(f"{place} has an empty {part} ({value!r}): fill it in, or drop it.")
    return parts.get("prompt", ""), parts.get("target") or parts["text"]
