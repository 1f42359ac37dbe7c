"""End to end with the stock Trainer: what trains, what is evaluated, and the same bits after a
stop.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from bases import CAUSAL, CLASSIFIERS, causal_base
from core.mixtures import LEVELS, ROUTERS_AT_LEVELS, SCOPES, causal, classifier, told
from training.runs import (
    LOSSES,
    Recorder,
    assert_bits,
    batch,
    bits,
    classes,
    gradients,
    rows_of,
    train,
    trainer,
    without_losses,
)
from transformers import TrainerCallback

from moelora import MoeLoraForCausalLM, MoeLoraForSequenceClassification
from moelora.training import MoeLoraCallback

NOISY = {"router_jitter_noise": 0.2, "lora_dropout": 0.2, **LOSSES}


def _base_bits(model):
    return {n: t for n, t in bits(model).items() if not model.moelora.owns(n)}


@pytest.mark.parametrize("router,level", ROUTERS_AT_LEVELS)
def test_the_loss_falls_and_the_base_keeps_its_bits(level, router, tmp_path):
    model = causal(active=False, routing_level=level, router=router)
    before = _base_bits(model)
    inputs = batch(8)
    data = rows_of({**inputs, **told(model, inputs["input_ids"])})
    # Experts that are drawn, not chosen, learn more slowly.
    steps = 90 if router == "random" else 40
    run = trainer(model, data, tmp_path, per_device_train_batch_size=8, max_steps=steps)
    run.train()
    losses = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0] - 0.3
    assert_bits(_base_bits(model), before)


@pytest.mark.parametrize("make", [causal, classifier])
def test_optimizer_state_holds_what_trains_and_nothing_else(make, tmp_path):
    model = make(**LOSSES)
    run = trainer(model, rows_of(batch(8) if make is causal else classes(8)), tmp_path)
    run.train()
    trained = {id(p) for p in model.parameters() if p.requires_grad}
    assert {id(p) for group in run.optimizer.param_groups for p in group["params"]} == trained
    assert {id(p) for p in run.optimizer.optimizer.state} == trained


@pytest.mark.parametrize("experts_per_tok", [1, 2])
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("level", LEVELS)
def test_every_trainable_parameter_gets_a_gradient(level, scope, experts_per_tok):
    model = causal(routing_level=level, router_scope=scope, num_experts_per_tok=experts_per_tok)
    # Without router losses, so that what the routers get comes through the logits.
    found = gradients(without_losses(model), **batch())
    assert not [name for name, g in found.items() if not g.abs().max() > 0]


@pytest.mark.parametrize("name", CAUSAL)
def test_only_experts_and_routers_train(name):
    model = causal(name, active=False)
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trainable == {n for n, _ in model.named_parameters() if model.moelora.owns(n)}


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_a_classifier_trains_its_head_too_and_saves_it(name, tmp_path):
    model = classifier(name, active=False)
    head = {n for n, p in model.named_parameters() if p.requires_grad and not model.moelora.owns(n)}
    before = bits(model)
    run = trainer(model, rows_of(classes(8)), tmp_path, max_steps=12)
    run.train()
    losses = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    assert head and all(not torch.equal(model.state_dict()[n], before[n]) for n in head)
    run.save_model(str(tmp_path / "saved"))
    restored = MoeLoraForSequenceClassification.from_pretrained(
        str(tmp_path / "saved"), base=classifier(name).unload()
    )
    assert_bits(bits(restored), bits(model))


@pytest.mark.parametrize("level", LEVELS)
def test_evaluation_gives_the_plain_loss_and_logits_alone(level, tmp_path):
    model, inputs, seen = causal("gpt2", routing_level=level, **LOSSES), batch(8), []

    def metrics(prediction):
        seen.append(prediction.predictions)
        return {"rows": len(prediction.label_ids)}

    data = rows_of(inputs)
    run = trainer(
        model,
        data,
        tmp_path,
        eval_dataset=data,
        compute_metrics=metrics,
        per_device_eval_batch_size=8,
    )
    assert run.label_names == ["labels"]
    found = run.evaluate()
    with torch.no_grad():
        outputs = without_losses(model).eval()(**inputs)
    logits = outputs.logits[:, :-1].flatten(0, 1)
    plain = torch.nn.functional.cross_entropy(logits, inputs["labels"][:, 1:].flatten())
    assert found["eval_loss"] == pytest.approx(float(plain), rel=1e-5)
    assert found["eval_rows"] == 8
    assert isinstance(seen[0], np.ndarray) and seen[0].shape == (8, 10, 64)
    np.testing.assert_allclose(seen[0], outputs.logits.numpy(), rtol=1e-4, atol=1e-5)


class _Snapshots(TrainerCallback):
    def __init__(self):
        self.bits = {}

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.bits[state.global_step] = bits(model)


def test_load_best_model_at_end_brings_the_best_weights_back(tmp_path):
    scores, snapshots = iter([1.0, 9.0, 3.0, 2.0]), _Snapshots()
    settings = {
        "max_steps": 4,
        "eval_strategy": "steps",
        "save_strategy": "steps",
        "eval_steps": 1,
        "save_steps": 1,
        "save_total_limit": 1,
        "load_best_model_at_end": True,
        "metric_for_best_model": "score",
        "greater_is_better": True,
    }
    data, model = rows_of(batch(8)), causal(**LOSSES)
    scored = {"eval_dataset": data, "compute_metrics": lambda _: {"score": next(scores)}}
    run = trainer(model, data, tmp_path, [snapshots], **scored, **settings)
    run.train()
    assert run.state.best_global_step == 2
    assert_bits(bits(model), snapshots.bits[2])
    differing = [
        n for n in snapshots.bits[4] if not torch.equal(snapshots.bits[4][n], snapshots.bits[2][n])
    ]
    assert len(differing) > 10
    # Versions of transformers differ in whether the last one stays beside the best.
    kept = {path.name for path in tmp_path.glob("checkpoint-*")}
    assert {"checkpoint-2"} <= kept <= {"checkpoint-2", "checkpoint-4"}


RUNS = {
    "token": {},
    "sequence": {"routing_level": "sequence", "router_scope": "layer"},
    "bias": {"router_bias_update_rate": 0.05, "router_scope": "model"},
}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", RUNS)
def test_stopping_and_resuming_gives_the_bits_of_an_uninterrupted_run(
    kind, checkpointing, tmp_path
):
    settings = {
        "save_strategy": "steps",
        "save_steps": 2,
        "gradient_accumulation_steps": 2,
        "per_device_train_batch_size": 2,
        "gradient_checkpointing": checkpointing,
        "lr_scheduler_type": "cosine",
    }
    data = rows_of(batch(12))

    def run(folder, stop=None, resume=None):
        torch.manual_seed(99)
        model, recorder = causal(**NOISY, **RUNS[kind]), Recorder()
        callbacks = [recorder, _Stop(stop)] if stop else [recorder]
        own = trainer(model, data, tmp_path / folder, callbacks, **{**settings, "max_steps": 5})
        own.train(resume_from_checkpoint=resume)
        return bits(model), recorder

    whole, recorder = run("whole")
    run("stopped", stop=2)
    assert not (tmp_path / "stopped" / "checkpoint-4").exists()
    resumed, after = run("stopped", resume=str(tmp_path / "stopped" / "checkpoint-2"))
    assert len(after.gradients) == 3
    assert_bits(resumed, whole)
    for name in ("current", "previous"):
        pairs = zip(getattr(after, name), getattr(recorder, name)[2:])
        assert all(torch.equal(a, b) for a, b in pairs)
    assert int(whole["moelora.load.previous"].sum()) > 0


class _Stop(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= self.step


def test_the_same_seed_gives_the_same_bits_and_another_seed_others(tmp_path):
    def run(seed):
        model = causal(**NOISY)
        train(model, rows_of(batch(8)), tmp_path, max_steps=3, seed=seed)
        return bits(model)

    first = run(1)
    assert_bits(run(1), first)
    other = run(2)
    assert any(not torch.equal(other[name], first[name]) for name in first)


@pytest.mark.parametrize("level", LEVELS)
def test_a_trained_model_reloads_with_the_same_logits(level, tmp_path):
    model = causal(routing_level=level, **LOSSES)
    run = trainer(model, rows_of(batch(8)), tmp_path)
    run.train()
    run.save_model(str(tmp_path / "saved"))
    restored = MoeLoraForCausalLM.from_pretrained(str(tmp_path / "saved"), base=causal_base())
    inputs = batch()
    assert torch.equal(restored(**inputs).logits, model.eval()(**inputs).logits)


def test_callback_logs_the_load_of_the_experts(tmp_path):
    run = trainer(causal(**LOSSES), rows_of(batch(8)), tmp_path, [MoeLoraCallback()])
    run.train()
    logged = [entry for entry in run.state.log_history if "loss" in entry]
    assert len(logged) == 2
    for entry in logged:
        assert 1 <= entry["expert_mean_peak_load"] <= entry["expert_peak_load"] <= 4
    assert run.model.moelora.loss_scale is None
