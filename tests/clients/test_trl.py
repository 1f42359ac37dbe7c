"""TRL's SFTTrainer, whose forward calls the backbone and the head in the model's place."""

from __future__ import annotations

import copy

import pytest
import torch
from clients.trl_runs import run, tokenized, words_tokenizer
from core.mixtures import LEVELS, SCOPES, causal, tokens
from training.runs import LOSSES, assert_same, difference, open_window, train, without_losses
from trl import SFTConfig, SFTTrainer

from moelora import MoeLoraCallback

# Of fp32: TRL sums the logits in tiles.
TOLERANCE = 1e-4


def sft(model, data, folder, **settings):
    open_window(model)
    return run(SFTTrainer, SFTConfig, model, data, folder, **settings)[1]


def stock(model, inputs, folder, **settings):
    from training.runs import rows_of

    open_window(model)
    return train(model, rows_of(inputs), folder, max_steps=1, **settings)


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("level", LEVELS)
def test_a_step_has_the_gradients_and_the_load_of_the_stock_trainer(level, scope, tmp_path):
    inputs, data = tokenized(4)
    model = causal(routing_level=level, router_scope=scope, **LOSSES)
    expected = stock(copy.deepcopy(model), inputs, tmp_path)
    found = sft(model, data, tmp_path)
    assert_same(found.gradients[0], expected.gradients[0], TOLERANCE)
    assert torch.equal(found.current[0], expected.current[0])
    assert int(found.current[0].sum()) > 0
    lossless = sft(without_losses(causal(routing_level=level, router_scope=scope)), data, tmp_path)
    assert difference(lossless.gradients[0], found.gradients[0]) > 0.01


@pytest.mark.parametrize("level", LEVELS)
def test_accumulation_is_exact_with_the_callback_and_refused_without(level, tmp_path):
    inputs, data = tokenized(8)
    model = causal(routing_level=level, **LOSSES)
    cut = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    expected = stock(copy.deepcopy(model), inputs, tmp_path, per_device_train_batch_size=8)
    found = sft(copy.deepcopy(model), data, tmp_path, callbacks=[MoeLoraCallback()], **cut)
    assert_same(found.gradients[0], expected.gradients[0], TOLERANCE)
    with pytest.raises(RuntimeError, match="MoeLoraCallback"):
        sft(model, data, tmp_path, **cut)
    # Nothing to get wrong.
    sft(without_losses(model), data, tmp_path, **cut)


def test_sequence_level_reads_texts_whose_every_token_is_a_label_by_their_prefix(tmp_path):
    inputs, data = tokenized(4)
    inputs["labels"] = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    data = data.map(lambda row: {"labels": row["input_ids"]})
    model = causal(routing_level="sequence", router_prefix_tokens=3, **LOSSES)
    callbacks = [MoeLoraCallback()]
    expected = stock(copy.deepcopy(model), inputs, tmp_path)
    found = sft(model, data, tmp_path, callbacks=callbacks)
    assert_same(found.gradients[0], expected.gradients[0], TOLERANCE)


def test_sequence_level_takes_the_prompts_of_a_router_mask(tmp_path):
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    inputs, data = tokenized(4)
    inputs["router_mask"] = torch.arange(inputs["input_ids"].shape[1]).expand(4, -1) < 2
    model = causal(routing_level="sequence", **LOSSES)
    expected = stock(copy.deepcopy(model), inputs, tmp_path)
    unmasked = stock(
        copy.deepcopy(model), {**inputs, "router_mask": ~(inputs["labels"] != -100)}, tmp_path
    )

    class Marking(DataCollatorForLanguageModeling):
        def torch_call(self, examples):
            made = super().torch_call(examples)
            made["router_mask"] = torch.arange(made["input_ids"].shape[1]).expand(4, -1) < 2
            return made

    open_window(model)
    recorder = run(
        SFTTrainer, SFTConfig, model, data, tmp_path, data_collator=Marking(pad_token_id=0)
    )[1]
    assert_same(recorder.gradients[0], expected.gradients[0], TOLERANCE)
    assert difference(unmasked.gradients[0], expected.gradients[0]) > 0.01


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(reentrant, tmp_path):
    _, data = tokenized(4)
    model = causal(router_scope="layer", **LOSSES)
    expected = sft(copy.deepcopy(model), data, tmp_path, gradient_checkpointing=False)
    settings = {"gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
    found = sft(model, data, tmp_path, gradient_checkpointing=True, **settings)
    assert_same(found.gradients[0], expected.gradients[0], TOLERANCE)
    assert torch.equal(found.current[0], expected.current[0])


def test_a_model_is_evaluated_and_generates_while_trl_holds_its_forward(tmp_path):
    _, data = tokenized(4)
    model = causal(routing_level="sequence")
    expected = model.generate(tokens(), max_new_tokens=3, do_sample=False)
    logits = model(tokens()).logits
    args = SFTConfig(str(tmp_path), use_cpu=True, bf16=False, report_to=[], disable_tqdm=True)
    made = SFTTrainer(
        model=model,
        args=args,
        train_dataset=data,
        eval_dataset=data,
        processing_class=words_tokenizer(),
    )
    assert "forward" in vars(model)
    assert torch.equal(model.generate(tokens(), max_new_tokens=3, do_sample=False), expected)
    assert torch.equal(model(tokens()).logits, logits)
    assert made.evaluate()["eval_loss"] > 0
    assert len(model.route(input_ids=tokens()).top_experts()) == 2


def test_after_training_the_base_comes_out_as_it_was(tmp_path):
    from bases import causal_base

    _, data = tokenized(4)
    model = causal(**LOSSES)
    sft(model, data, tmp_path)
    base = model.unload()
    assert type(base) is type(causal_base()) and "forward" not in vars(base)
    assert torch.equal(base.eval()(tokens()).logits, causal_base()(tokens()).logits)
    assert torch.equal(
        base.model(tokens()).last_hidden_state, causal_base().model(tokens()).last_hidden_state
    )
    base.generate(tokens(), max_new_tokens=2)
    # And takes a mixture again.
    from core.mixtures import into

    into(base)(tokens())


def test_experts_on_the_head_are_refused(tmp_path):
    _, data = tokenized(4)
    model = causal(target_modules=["q_proj", "lm_head"])
    with pytest.raises(ValueError, match=r"lm_head has experts.*target_modules"):
        sft(model, data, tmp_path)
