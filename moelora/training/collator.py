"""`PadRouting`: a data collator that pads what routers are told along with what models read."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..core.losses import IGNORE
from ..validation import check_choice

ROUTING = ("router_mask", "expert_targets")
# What a key with a value for each token is filled up with, besides input_ids.
FILL = {"attention_mask": 0, "token_type_ids": 0, "router_mask": 0}
FILL |= {"labels": IGNORE, "expert_targets": IGNORE}


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
        self.padding_side = padding_side

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
                raise ValueError(
                    f"{name} is in {len(given)} of {len(rows)} rows: give it to all (−100: none)."
                )
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
