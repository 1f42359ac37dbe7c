"""By how much the loop scales the loss, where it does not come from the model; when a window
ends.
"""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from core.mixtures import causal, tokens
from training.runs import batch, gradients_of, open_window

LOSSES = {"router_aux_loss_coef": 0.5, "router_z_loss_coef": 0.1}


def _backward(model, inputs, loss_of, factor=1.0):
    model.zero_grad()
    open_window(model)
    (loss_of(model(**inputs)) * factor).backward()
    return gradients_of(model)


def _from_logits(inputs):
    def loss(outputs):
        logits = outputs.logits[:, :-1].flatten(0, 1)
        return torch.nn.functional.cross_entropy(logits, inputs["labels"][:, 1:].flatten())

    return loss


def test_labels_passed_and_a_loss_from_the_logits_take_the_scale_that_was_set():
    """As a custom compute_loss does: the model's own loss is never used."""
    inputs = batch()
    model = causal(**LOSSES).train()
    expected = _backward(model, inputs, lambda outputs: outputs.loss, 3.0)
    model.moelora.loss_scale = 3.0
    of_logits = _backward(causal(**LOSSES).train(), inputs, _from_logits(inputs), 3.0)
    set_right = causal(**LOSSES).train()
    set_right.moelora.loss_scale = 3.0
    right = _backward(set_right, inputs, _from_logits(inputs), 3.0)
    routers = [name for name in expected if "router" in name]
    assert routers
    for name in routers:
        torch.testing.assert_close(right[name], expected[name], rtol=1e-4, atol=1e-6)
    # Without it the factor is taken for 1, which this loop does not have.
    assert any(not torch.allclose(of_logits[n], expected[n], rtol=1e-2) for n in routers)


def test_labels_passed_and_a_loss_from_the_logits_under_several_processes_raise(tmp_path):
    model = causal(**LOSSES).train()
    inputs = batch()
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        world, dist.get_world_size = dist.get_world_size, lambda *_: 2
        try:
            outputs = model(**inputs)
            with pytest.raises(RuntimeError, match="MoeLoraCallback"):
                _from_logits(inputs)(outputs).backward()
            outputs = model(**inputs)
            outputs.loss.backward()
        finally:
            dist.get_world_size = world
    finally:
        dist.destroy_process_group()


def test_labels_passed_and_a_loss_from_the_logits_under_fp16_raise():
    model = causal(**LOSSES).train()
    inputs = batch()
    with torch.autocast("cpu", dtype=torch.float16):
        outputs = model(**inputs)
        loss = _from_logits(inputs)(outputs)
    with pytest.raises(RuntimeError, match="loss_scale"):
        loss.backward()


def _step(model, optimizer, forwards=1, clear=True):
    """One optimizer step over the sum of several forwards' losses (as of a chosen and a rejected
    answer); returns the counts that the fractions come from.
    """
    losses = [model(**batch(seed=i)).loss for i in range(forwards)]
    torch.stack(losses).sum().backward()
    optimizer.step()
    if clear:
        optimizer.zero_grad()
    return model.moelora.load.previous.clone()


@pytest.mark.parametrize("learning_rate", [0.0, 1e-2])
def test_two_forwards_before_one_backward_are_one_step_of_the_window(learning_rate):
    model = causal(**LOSSES).train()
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), learning_rate)
    _step(model, optimizer, forwards=2)
    load = model.moelora.load
    whole = load.current.clone()
    model(**batch(seed=0))
    assert torch.equal(load.previous, whole), "both forwards of the step before, and no more"
    model(**batch(seed=1))
    assert torch.equal(load.previous, whole), "the second forward of a step begins no window"


def test_a_forward_that_failed_and_is_made_again_begins_no_second_window():
    model = causal(**LOSSES).train()
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), 1e-2)
    _step(model, optimizer)
    load = model.moelora.load
    whole = load.current.clone()

    def fail(*_):
        raise MemoryError

    handle = model.lm_head.register_forward_pre_hook(fail)
    with pytest.raises(MemoryError):
        model(**batch(seed=2))
    handle.remove()
    model(**batch(seed=2))
    assert torch.equal(load.previous, whole)


def test_a_step_that_clears_no_gradient_still_ends_the_window():
    model = causal(**LOSSES).train()
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), 1e-2)
    losses = model(**batch()).loss
    losses.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=False)
    whole = model.moelora.load.current.clone()
    model(tokens(), labels=tokens())
    assert torch.equal(model.moelora.load.previous, whole)
