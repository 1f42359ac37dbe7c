"""Experts on an updated base: refused without the override; the report against counts by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from bases import causal_base, classifier_base
from core.mixtures import causal, classifier

from moelora import MoeLoraForCausalLM
from moelora.recipes import compare_bases

IDS = torch.arange(3 * 9).view(3, 9) % 17 + 3


def updated_base() -> Any:
    base = causal_base("llama")
    torch.manual_seed(7)
    with torch.no_grad():
        for parameter in base.parameters():
            parameter += 0.3 * parameter.std() * torch.randn_like(parameter)
    return base


def test_experts_move_to_an_updated_base(tmp_path: Path) -> None:
    old = causal("llama")
    old.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="allow_base_mismatch"):
        MoeLoraForCausalLM.from_pretrained(tmp_path, base=updated_base())
    new = MoeLoraForCausalLM.from_pretrained(
        tmp_path, base=updated_base(), allow_base_mismatch=True
    ).eval()
    labels = IDS.clone()
    labels[0, :4] = -100
    report = compare_bases(
        old,
        new,
        [
            {"input_ids": IDS[:2], "labels": labels[:2]},
            {"input_ids": IDS[2:], "labels": labels[2:]},
        ],
    )

    with torch.no_grad():
        logits = [model(IDS).logits[:, :-1] for model in (old, new)]
    wanted, counted = labels[:, 1:], labels[:, 1:] != -100
    was, now = ((values.argmax(-1) == wanted)[counted] for values in logits)
    losses = [
        torch.nn.functional.cross_entropy(values[counted], wanted[counted]).item()
        for values in logits
    ]
    assert report.predictions == int(counted.sum()) == 21
    assert (report.loss_before, report.loss_after) == pytest.approx(losses, rel=1e-5)
    assert (report.right_before, report.right_after) == (int(was.sum()), int(now.sum()))
    assert (report.negative_flips, report.positive_flips) == (
        int((was & ~now).sum()),
        int((~was & now).sum()),
    )
    assert report.right_after - report.right_before == report.positive_flips - report.negative_flips
    assert f"{report.loss_after:.4f}" in report.table()


def test_planted_flips() -> None:
    """Labels that are the old model's own predictions: all right before, and every change is a
    negative flip.
    """
    model = classifier("bert")
    changed = classifier_base("bert").eval()
    with torch.no_grad():
        labels = model(IDS).logits.argmax(-1)
        changed.classifier.weight.neg_()
        changed.classifier.bias.neg_()
    report = compare_bases(model, changed, [{"input_ids": IDS, "labels": labels}])
    assert report.right_before == report.predictions == 3
    assert report.positive_flips == 0 and report.negative_flips == 3 - report.right_after
    assert report.negative_flip_rate == report.negative_flips / 3


@pytest.mark.parametrize("prompt", [0, 4])
def test_a_sequence_router_reads_the_prompt_alone(prompt: int) -> None:
    """As in training: no target is read, and a prefix that is read takes no loss."""
    model = causal("llama", routing_level="sequence", router_prefix_tokens=3)
    labels = IDS.clone()
    labels[:, :prompt] = -100
    inputs = {"input_ids": IDS, "labels": labels, "attention_mask": torch.ones_like(IDS)}
    with torch.no_grad():
        expected = float(model(**inputs).loss)
    report = compare_bases(model, model, [inputs])
    assert report.loss_before == pytest.approx(expected, rel=1e-5)
    assert report.predictions == 3 * (9 - (prompt or 3))


def test_training_mode_stays_and_mistakes_are_named() -> None:
    model = causal("llama").train()
    batch = {"input_ids": IDS, "labels": IDS}
    assert compare_bases(model, model, [batch]).negative_flips == 0 and model.training
    with pytest.raises(ValueError, match="no labels"):
        compare_bases(model, model, [{"input_ids": IDS}])
    with pytest.raises(ValueError, match="no label other than -100"):
        compare_bases(model, model, [{"input_ids": IDS, "labels": torch.full_like(IDS, -100)}])
    with pytest.raises(ValueError, match="makes 27 predictions for 3 labels"):
        compare_bases(model, model, [{"input_ids": IDS, "labels": IDS[:, 0] * 0}])
    larger = causal_base("llama")
    larger.resize_token_embeddings(70)
    with pytest.raises(ValueError, match="expected the same shape"):
        compare_bases(model, larger, [batch])
