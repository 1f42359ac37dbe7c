"""`Texts`: prompts with their targets as token ids, and `PadRouting`, which makes them batches."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from ..core.losses import IGNORE
from ..validation import check_choice, check_type

# What each field of a row is; of two for the same part the later one counts.
FIELDS = {
    "text": "text",
    "prompt": "prompt",
    "instruction": "prompt",
    "completion": "target",
    "output": "target",
}
ROUTING = ("router_mask", "expert_targets")
# What a key with a value for each token is filled up with, besides input_ids.
FILL = {"attention_mask": 0, "token_type_ids": 0, "router_mask": 0}
FILL |= {"labels": IGNORE, "expert_targets": IGNORE}


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
        check_type("rows", rows, not isinstance(rows, (str, Mapping)), "a list of rows")
        if max_length is None:
            max_length = int(getattr(tokenizer, "model_max_length", None) or sys.maxsize)
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
            raise ValueError(f"There are {len(numbers)} expert_targets for {len(self)} rows.")
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


class PadRouting:
    """Rows of different lengths as one batch: router_mask and expert_targets are padded too.

    A stock collator alone suffices where expert_targets is one number a row and no key of the
    routers' has a value for each token.

    Args:
        collator: a stock collator that pads everything else (`DataCollatorWithPadding`,
            `DataCollatorForSeq2Seq` …). None fills up input_ids with `pad_token_id`, labels with
            −100, and attention_mask, which is made where there is none, with 0.
        pad_token_id: what input_ids are filled up with, without a collator.
        padding_side: "right" or "left"; by default the collator's tokenizer's, else right.

    Raises:
        ValueError: another padding side. When called: rows with different keys, expert_targets that
            fit neither a row nor its tokens, or a collator that packs rows.
    """

    def __init__(
        self,
        collator: Callable[[list[dict[str, Any]]], Mapping[str, Any]] | None = None,
        *,
        pad_token_id: int = 0,
        padding_side: str | None = None,
    ):
        if padding_side is None:
            padding_side = getattr(getattr(collator, "tokenizer", None), "padding_side", "right")
        check_choice("padding_side", padding_side, ("right", "left"))
        self.collator = collator
        self.fill = {**FILL, "input_ids": pad_token_id}
        self.padding_side = str(padding_side)

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        plain = [{k: v for k, v in row.items() if k not in ROUTING} for row in rows]
        batch = dict(self._padded(plain) if self.collator is None else self.collator(plain))
        ids = batch["input_ids"]
        if len(ids) != len(rows):
            made = f"{type(self.collator).__name__} made {len(ids)} rows of {len(rows)}"
            raise ValueError(f"{made}: a packed row has no single prompt, so use one that pads.")
        for name in ROUTING:
            given = [torch.as_tensor(row[name]) for row in rows if name in row]
            # With a router_mask in some rows alone, the model finds each prompt by the labels.
            if len(given) == len(rows):
                _check_lengths(name, given, rows)
                batch[name] = self._stacked(name, given, ids.shape[1])
            elif given and name == "expert_targets":
                raise ValueError(f"{name} is in {len(given)} of {len(rows)} rows: give it to all.")
        return batch

    def _padded(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        if any(row.keys() != rows[0].keys() for row in rows):
            raise ValueError(f"The rows have different keys: {[sorted(row) for row in rows][:4]}.")
        lengths = [len(row["input_ids"]) for row in rows]
        columns = {"attention_mask": [torch.ones(n, dtype=torch.int64) for n in lengths]}
        columns |= {name: [torch.as_tensor(row[name]) for row in rows] for name in rows[0]}
        return {name: self._stacked(name, own, max(lengths)) for name, own in columns.items()}

    def _stacked(self, name: str, tensors: list[Tensor], width: int) -> Tensor:
        """One key's tensors; those `[n]` of tokens are filled up to `[batch, width]`."""
        if name not in self.fill or tensors[0].dim() != 1:
            return torch.stack(tensors)
        fill = self.fill[name]
        padded = nn.utils.rnn.pad_sequence(tensors, True, fill, self.padding_side)
        missing = width - padded.shape[1]
        pad = (missing, 0) if self.padding_side == "left" else (0, missing)
        return nn.functional.pad(padded, pad, value=fill)


def _check_lengths(name: str, given: list[Tensor], rows: Sequence[Mapping[str, Any]]) -> None:
    """Raise unless a routers' key has one number in every row, or one a token in every row."""
    for i, (tensor, row) in enumerate(zip(given, rows)):
        length = len(row["input_ids"])
        if tuple(tensor.shape) != (length,) and any(own.dim() for own in given):
            raise ValueError(
                f"{name} of row {i} has shape {tuple(tensor.shape)}; expected [{length}], as its "
                "input_ids, or one number in every row."
            )


def padded_batch(rows: Sequence[Mapping[str, Any]], device: torch.device) -> dict[str, Tensor]:
    """Rows as one batch on `device`, padded on the right, so that each begins at position 0."""
    return {name: tensor.to(device) for name, tensor in PadRouting()(rows).items()}


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
            f"The data of {name!r} is a {type(data).__name__}; expected Texts (use Texts.of), or a "
            "dataset with a length and input_ids."
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
