"""A loop that computes its loss outside of the model, in the last, shorter step of an epoch."""

from __future__ import annotations

import pytest
import torch
from core.mixtures import causal
from torch.utils.data import IterableDataset
from training.runs import batch, rows_of, trainer
from transformers import Trainer

from moelora import MoeLoraCallback


class Outside(Trainer):
    """As TRL's DPO: a mean over its own batch, and no num_items_in_batch for the model."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.model_accepts_loss_kwargs = False
        self.scales = []

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        inputs.pop("labels")
        # What the Trainer divides by, and what the model was told.
        told = model.moelora.mean_loss_scale
        self.scales.append((1 / self.current_gradient_accumulation_steps, told))
        return model(**inputs).logits.square().mean()


def scales(data, folder, resume=None, **settings):
    made = trainer(
        causal(), data, folder, [MoeLoraCallback()], per_device_train_batch_size=2, **settings
    )
    made.__class__ = Outside
    made.model_accepts_loss_kwargs = False
    made.scales = []
    made.train(resume_from_checkpoint=resume)
    return made.scales


@pytest.mark.parametrize("rows,steps", [(10, [1 / 3] * 3 + [1 / 2] * 2), (4, [1 / 2] * 2)])
def test_the_last_step_of_an_epoch_is_of_fewer_micro_batches(rows, steps, tmp_path):
    data = rows_of(batch(rows))
    settings = {"gradient_accumulation_steps": 3, "max_steps": -1, "num_train_epochs": 2}
    found = scales(data, tmp_path, **settings, save_strategy="steps", save_steps=1)
    assert found == [(scale, scale) for scale in steps * 2]
    if rows == 10:
        # In the middle of an epoch: its rest, and the next one.
        again = str(tmp_path / "checkpoint-1")
        found = scales(data, tmp_path / "again", resume=again, **settings)
        assert found == [(scale, scale) for scale in (steps * 2)[3:]]
        settings |= {"ignore_data_skip": True}
        found = scales(data, tmp_path / "anew", resume=again, **settings)
        assert all(true == told for true, told in found) and found[3:5] == [(0.5, 0.5)] * 2


def test_rows_without_an_end_are_taken_for_full_steps(tmp_path):
    class Endless(IterableDataset):
        def __iter__(self):
            while True:
                yield from rows_of(batch(4))

    settings = {"gradient_accumulation_steps": 3, "max_steps": 2}
    found = scales(Endless(), tmp_path, **settings)
    assert torch.tensor(found).eq(1 / 3).all() and len(found) == 6
