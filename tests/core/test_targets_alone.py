"""Expert labels without labels: the stock Trainer trains the routers alone."""

from __future__ import annotations

import pytest
import torch
from core.mixtures import (
    LEVELS,
    NO_ROUTER_LOSS,
    SCOPES,
    causal,
    classifier,
    expert_parameters,
    refused_by_old_transformers,
    tokens,
)
from transformers import Trainer, TrainingArguments

ROWS, LENGTH = 16, 6


def rows(level: str) -> list[dict[str, torch.Tensor]]:
    """Texts of two kinds, by their tokens, each with its expert; no labels."""
    ids = torch.cat([tokens(ROWS, LENGTH, seed=1) % 20 + 3, tokens(ROWS, LENGTH, seed=2) % 20 + 30])
    made = [
        {"input_ids": row, "expert_targets": torch.tensor(1 + 2 * (i // ROWS))}
        for i, row in enumerate(ids)
    ]
    if level == "sequence":
        made = [{**row, "router_mask": torch.ones(LENGTH, dtype=torch.bool)} for row in made]
    return made


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("scope", SCOPES)
def test_stock_trainer_trains_the_routers_of_every_scope(scope, level, tmp_path):
    fields = {"router_input_norm": True, "num_experts_per_tok": 1, **NO_ROUTER_LOSS}
    model = causal(router_scope=scope, routing_level=level, **fields)
    model.freeze_experts(model.moelora_config.expert_names)
    experts = {name: p.clone() for name, p in expert_parameters(model).items()}
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        learning_rate=0.05,
        num_train_epochs=8,
        per_device_train_batch_size=8,
        seed=0,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        weight_decay=0.0,
        logging_steps=1,
        disable_tqdm=True,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=rows(level))
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.5 * losses[0]
    found = (
        model.eval()
        .route(input_ids=torch.stack([row["input_ids"] for row in rows(level)]))
        .top_experts()
    )
    right = [name == ("expert_1" if i < ROWS else "expert_3") for i, name in enumerate(found)]
    assert sum(right) >= 0.9 * len(right)
    assert all(torch.equal(p, experts[name]) for name, p in expert_parameters(model).items())


@pytest.mark.parametrize("reentrant", [None, False, True])
@pytest.mark.parametrize("scope", SCOPES)
def test_the_gradient_is_that_of_the_attached_loss_however_layers_are_checkpointed(
    scope, reentrant
):
    targets = torch.tensor([2, 0])
    found = []
    for alone in (True, False):
        model = causal(router_scope=scope, **NO_ROUTER_LOSS).train()
        if alone and reentrant is not None:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        if alone:
            with refused_by_old_transformers(scope, reentrant) as refused:
                out = model(tokens(), expert_targets=targets)
                assert torch.equal(out.loss, out.expert_aux_loss)
                (out["loss"] / 4).backward()
            if refused:
                return
        else:
            model(tokens(), labels=tokens().fill_(-100), expert_targets=targets)
            out = model(tokens(), expert_targets=targets)
            (0 * out.logits.sum()).backward()
        found.append({name: p.grad for name, p in model.moelora.routers.named_parameters()})
    for name, gradient in found[0].items():
        torch.testing.assert_close(4 * gradient, found[1][name], rtol=1e-5, atol=1e-7)
        assert bool(gradient.any())


@torch.no_grad()
def test_evaluation_has_the_loss_too_and_labels_keep_theirs():
    model = causal()
    targets = torch.tensor([2, 0])
    out = model(tokens(), expert_targets=targets)
    assert torch.equal(out.loss, out.expert_aux_loss) and next(iter(out)) == "loss"
    with_labels = model(tokens(), labels=tokens(), expert_targets=targets)
    assert torch.equal(with_labels.loss, model(tokens(), labels=tokens()).loss)
    assert model(tokens()).loss is None and model(tokens(), output_expert_routing=True).loss is None
    assert torch.equal(
        *(classifier()(tokens(), expert_targets=targets)[k] for k in ("loss", "expert_aux_loss"))
    )
