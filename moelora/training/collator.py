"""`PadRouting`: a data collator that pads what routers are told along with what models read."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..core.losses import IGNORE
from ..validation import check_choice

# What each key of the model's own is filled up with, besides input_ids.
FILL = {"attention_mask": 0, "labels": IGNORE, "token_type_ids": 0}
ROUTING_FILL = {"router_mask": False, "expert_targets": IGNORE}


class PadRouting:
    """Rows of different lengths as one batch, with `router_mask` and `expert_targets` padded beside
    input_ids.

    collator: a stock collator (`DataCollatorWithPadding`, `DataCollatorForSeq2Seq` …) that pads
    everything else; None pads input_ids with `pad_token_id`, labels with −100 and attention_mask
    (made where there is none) with 0. Stock collators alone suffice where expert_targets is one
    number a row and nothing has a token axis.
    padding_side: "right" or "left"; by default the collator's tokenizer's, else right.

    Raises:
        ValueError: another padding side, rows with different keys, expert_targets as long as
        nothing, or a collator
            that packs.
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
        self.collator, self.pad_token_id, self.left = collator, pad_token_id, padding_side == "left"

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        plain = [{k: v for k, v in row.items() if k not in ROUTING_FILL} for row in rows]
        batch = dict(self._padded(plain) if self.collator is None else self.collator(plain))
        width = batch["input_ids"].shape[1]
        if len(batch["input_ids"]) != len(rows):
            raise ValueError(
                f"{type(self.collator).__name__} made {len(batch['input_ids'])} rows of {len(rows)}: a packed row has "
                "no single prompt, so use a collator that pads."
            )
        for name, fill in ROUTING_FILL.items():
            given = [torch.as_tensor(row[name]) for row in rows if name in row]
            if not given:
                continue
            if len(given) != len(rows) and name == "expert_targets":
                raise ValueError(
                    f"{name} is in {len(given)} of {len(rows)} rows: give it to all, −100 where none."
                )
            if len(given) != len(rows):
                # The model takes each row's prompt from its labels then, and a prefix where it has
                # none.
                continue
            batch[name] = self._routing(name, given, rows, width, fill)
        return batch

    def _routing(
        self,
        name: str,
        given: list[Tensor],
        rows: Sequence[Mapping[str, Any]],
        width: int,
        fill: Any,
    ) -> Tensor:
        """One key of the routers' as a tensor: `[batch]`, or padded to `[batch, width]`."""
        if all(t.dim() == 0 for t in given):
            return torch.stack(given)
        for i, (tensor, row) in enumerate(zip(given, rows)):
            if tuple(tensor.shape) != (len(row["input_ids"]),):
                raise ValueError(
                    f"{name} of row {i} has shape {tuple(tensor.shape)}; expected [{len(row['input_ids'])}], as its "
                    "input_ids, or one number in every row."
                )
        return torch.stack([self._fill(tensor, width, fill) for tensor in given])

    def _padded(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        if any(row.keys() != rows[0].keys() for row in rows):
            raise ValueError(f"The rows have different keys: {[sorted(row) for row in rows][:4]}.")
        rows = [
            {"attention_mask": torch.ones(len(row["input_ids"]), dtype=torch.int64), **row}
            for row in rows
        ]
        width, batch = max(len(row["input_ids"]) for row in rows), {}
        for name in rows[0]:
            tensors = [torch.as_tensor(row[name]) for row in rows]
            fill = self.pad_token_id if name == "input_ids" else FILL.get(name)
            ragged = fill is not None and tensors[0].dim() == 1
            batch[name] = torch.stack(
                [self._fill(t, width, fill) for t in tensors] if ragged else tensors
            )
        return batch

    def _fill(self, tensor: Tensor, width: int, fill: Any) -> Tensor:
        missing = width - len(tensor)
        return torch.nn.functional.pad(
            tensor, (missing, 0) if self.left else (0, missing), value=fill
        )
