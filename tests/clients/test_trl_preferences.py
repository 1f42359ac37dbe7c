"""TRL's trainers with a reference (DPO, KTO, GRPO), its RewardTrainer, and models by folder."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from bases import causal_base, classifier_base
from clients.trl_runs import preferences, run, text, tokenized, words_tokenizer
from core.mixtures import LEVELS, SCOPES, causal, into
from datasets import Dataset
from torch.nn.functional import logsigmoid
from training.runs import LOSSES, assert_same, gradients_of, only_routers, open_window
from trl import (
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    KTOConfig,
    KTOTrainer,
    RewardConfig,
    RewardTrainer,
    SFTConfig,
    SFTTrainer,
)

from moelora import MoeLoraForCausalLM

TOLERANCE = 1e-4
BETA = 0.1


def first_loss(trainer):
    return next(entry["loss"] for entry in trainer.state.log_history if "loss" in entry)


def folder_of(model, folder):
    """`model` saved with its base and a tokenizer, as a path."""
    model.save_pretrained(folder, save_base=True)
    words_tokenizer().save_pretrained(folder)
    return str(folder)


def batch_of(trainer, mask_name="completion_mask"):
    """The batch of one step: its inputs, and labels where an answer is."""
    rows = next(iter(trainer.get_train_dataloader()))
    inputs = {name: rows[name] for name in ("input_ids", "attention_mask")}
    labels = inputs["input_ids"].masked_fill(rows[mask_name] == 0, -100)
    return rows, inputs, labels


def answers(model, inputs, labels):
    """log p of each row's answer `[rows]`, by the stock forward."""
    logits = model(**inputs, labels=labels).logits[:, :-1].log_softmax(-1)
    targets = labels[:, 1:]
    found = logits.gather(2, targets.clamp(min=0)[..., None])[..., 0]
    return found.masked_fill(targets == -100, 0).sum(1)


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("level", LEVELS)
def test_dpo_has_the_gradients_of_the_loss_by_hand(level, scope, tmp_path):
    model = causal(routing_level=level, router_scope=scope, **LOSSES)
    before = copy.deepcopy(model)
    open_window(model)
    open_window(before)
    trainer, recorder = run(
        DPOTrainer, DPOConfig, model, preferences(), tmp_path, ref_model=copy.deepcopy(model)
    )
    assert first_loss(trainer) == pytest.approx(math.log(2), abs=1e-6)
    _, inputs, labels = batch_of(trainer)
    chosen, rejected = answers(before.train(), inputs, labels).chunk(2)
    margin = chosen - rejected
    (-logsigmoid(BETA * (margin - margin.detach()))).mean().backward()
    assert_same(recorder.gradients[0], gradients_of(before), TOLERANCE)
    assert torch.equal(recorder.current[0], before.moelora.load.current)


def test_the_reference_of_a_loaded_mixture_is_that_mixture(tmp_path):
    folder = folder_of(causal(**LOSSES), tmp_path / "mixture")
    model = MoeLoraForCausalLM.from_pretrained(folder)
    trainer, _ = run(DPOTrainer, DPOConfig, model, preferences(), tmp_path / "out")
    assert type(trainer.ref_model) is type(model) and trainer.ref_model is not model
    assert first_loss(trainer) == pytest.approx(math.log(2), abs=1e-6)


def test_a_mixture_that_has_no_folder_is_its_own_reference_by_a_copy_alone(tmp_path):
    causal_base().save_pretrained(tmp_path / "base")
    base = type(causal_base()).from_pretrained(tmp_path / "base")
    model = into(base, **LOSSES)
    with pytest.raises(OSError, match="Repo id|repo"):
        run(DPOTrainer, DPOConfig, model, preferences(), tmp_path / "out")


def test_kto_has_the_gradients_of_the_loss_by_hand(tmp_path):
    rows = [
        {"prompt": row["prompt"], "completion": row[kind], "label": kind == "chosen"}
        for row, kind in zip(preferences(), ("chosen", "rejected", "chosen", "rejected"))
    ]
    model = causal(routing_level="sequence", router_scope="layer", **LOSSES)
    before = copy.deepcopy(model)
    open_window(model)
    open_window(before)
    data = Dataset.from_list(rows)
    reference = copy.deepcopy(model)
    trainer, recorder = run(KTOTrainer, KTOConfig, model, data, tmp_path, ref_model=reference)
    assert first_loss(trainer) == pytest.approx(0.5, abs=1e-6)
    rows, inputs, labels = batch_of(trainer)
    found = answers(before.train(), inputs, labels)
    sign = torch.as_tensor(rows["label"]).float() * 2 - 1
    (1 - torch.sigmoid(BETA * sign * (found - found.detach()))).mean().backward()
    assert_same(recorder.gradients[0], gradients_of(before), TOLERANCE)
    assert torch.equal(recorder.current[0], before.moelora.load.current)


@pytest.mark.parametrize("level", LEVELS)
def test_grpo_trains_experts_and_routers_from_a_folder(level, tmp_path):
    folder = folder_of(causal(routing_level=level, router_scope="layer", **LOSSES), tmp_path / "m")
    model = MoeLoraForCausalLM.from_pretrained(folder)
    open_window(model)
    data = Dataset.from_list([{"prompt": text(5 + i, 6, 7)} for i in range(4)])
    trainer, recorder = run(
        GRPOTrainer,
        GRPOConfig,
        model,
        data,
        tmp_path / "out",
        reward_funcs=lambda completions, **_: [float(len(set(c.split()))) for c in completions],
        beta=0.04,
        num_generations=2,
        max_completion_length=6,
    )
    assert type(trainer.ref_model) is type(model)
    log = trainer.state.log_history[0]
    assert log["kl"] == pytest.approx(0, abs=1e-6)
    assert int(recorder.current[0].sum()) > 0
    routers = only_routers(recorder.gradients[0])
    assert routers and all(g.abs().max() > 0 for g in routers.values())


def test_a_reward_model_learns_and_comes_back(tmp_path):
    model = into(classifier_base("llama"), **LOSSES).unload()
    model.config.num_labels = 1
    model.score = torch.nn.Linear(32, 1, bias=False)
    model = into(model, **LOSSES)
    trainer, recorder = run(
        RewardTrainer, RewardConfig, model, preferences(), tmp_path / "out", max_steps=8
    )
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    assert int(recorder.current[0].sum()) > 0
    assert all(g.abs().max() > 0 for g in recorder.gradients[1].values())


@pytest.mark.parametrize("level", LEVELS)
def test_a_folder_trains_by_its_name_and_saves_to_another(level, tmp_path):
    folder = folder_of(causal(routing_level=level, **LOSSES), tmp_path / "mixture")
    _, data = tokenized(4)
    args = {"use_cpu": True, "bf16": False, "report_to": [], "max_steps": 1, "save_strategy": "no"}
    trainer = SFTTrainer(
        model=folder, args=SFTConfig(str(tmp_path / "out"), **args), train_dataset=data
    )
    assert isinstance(trainer.model, MoeLoraForCausalLM)
    trainer.train()
    trainer.save_model(str(tmp_path / "trained"))
    again = MoeLoraForCausalLM.from_pretrained(tmp_path / "trained")
    inputs = torch.tensor([[5, 6, 7]])
    model = trainer.model.eval()
    assert torch.equal(again(inputs).logits, model(inputs).logits)
    assert again.config.name_or_path == str(tmp_path / "trained")
