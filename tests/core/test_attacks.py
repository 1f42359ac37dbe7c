"""Mixtures that accelerate offloads, and `use_experts` that ends out of order: right or refused."""

from __future__ import annotations

import copy
import threading
from concurrent.futures import ThreadPoolExecutor

import accelerate
import pytest
import torch
from core.mixtures import LEVELS, SCOPES, causal, tokens


def _offloaded(model):
    return accelerate.cpu_offload(model, execution_device=torch.device("cpu"))


@torch.no_grad()
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("choice", [{"experts": "expert_1"}, {"ban": "expert_1"}])
def test_use_experts_of_an_offloaded_mixture(choice, scope, level):
    model = causal(router_scope=scope, routing_level=level)
    with model.use_experts(**choice):
        expected = model(tokens()).logits
    _offloaded(model)
    with model.use_experts(**choice):
        assert torch.equal(model(tokens()).logits, expected)


@torch.no_grad()
def test_banned_experts_of_an_offloaded_mixture():
    model = causal()
    settings = dict(banned_experts=["expert_1"], max_new_tokens=3, do_sample=False)
    expected = model.generate(tokens(), **settings)
    _offloaded(model)
    assert torch.equal(model.generate(tokens(), **settings), expected)


EDITS = {
    "freeze": lambda model: model.freeze_experts(["expert_1"]),
    "add": lambda model: model.add_expert("another"),
    "remove": lambda model: model.remove_expert("expert_0"),
    "replace": lambda model: model.replace_expert("expert_1"),
}


@torch.no_grad()
@pytest.mark.parametrize("edit", EDITS)
def test_a_changed_expert_of_an_offloaded_mixture_is_right_or_refused(edit):
    """accelerate brings back the tensors that it saw when it offloaded: the former experts."""
    model = causal()
    expected = copy.deepcopy(model)
    _offloaded(model)
    try:
        EDITS[edit](model)
    except ValueError:
        pass
    else:
        EDITS[edit](expected)
    assert torch.equal(model(tokens()).logits, expected(tokens()).logits)


@torch.no_grad()
def test_an_expert_of_an_offloaded_mixture_is_neither_written_nor_exported_unseen(tmp_path):
    model = _offloaded(causal())
    with pytest.raises(ValueError, match="offload"):
        # Rows on the meta device: what is written there is lost.
        model.moelora.expert(1)
    with pytest.raises(ValueError, match="offload"):
        model.export_expert("expert_1", tmp_path / "exported")


@pytest.mark.parametrize("how", ["wholly", "one layer"])
def test_experts_that_are_offloaded_do_not_train_unseen(how, tmp_path):
    """accelerate puts new parameters in for every forward: those of the optimizer get no
    gradient.
    """
    model = causal().train()
    if how == "wholly":
        _offloaded(model)
    else:
        parts = ("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head", "moelora")
        device_map = {**dict.fromkeys(parts, "cpu"), "model.layers.0": "disk"}
        device_map["model.layers.1"] = "cpu"
        accelerate.dispatch_model(model, device_map, "cpu", offload_dir=tmp_path)
    with pytest.raises(ValueError, match="offload"):
        model(tokens(), labels=tokens()).loss.backward()


def _streaming(model, name):
    with model.use_experts(name):
        yield 1


@torch.no_grad()
def test_contexts_that_end_in_another_order_leave_nothing_behind():
    """Two responses that are streamed by generators, the first of which ends first."""
    model = causal()
    expected = model(tokens()).logits
    first, second = _streaming(model, "expert_1"), _streaming(model, "expert_2")
    next(first)
    next(second)
    first.close()
    second.close()
    assert not model.moelora.overridden
    _while_another_thread_uses(model, lambda: _same(model, expected))


@torch.no_grad()
def test_a_context_that_ends_in_another_thread_leaves_nothing_behind():
    """As a web server's thread pool may close a generator."""
    model = causal()
    expected = model(tokens()).logits
    streaming = _streaming(model, "expert_1")
    next(streaming)
    with ThreadPoolExecutor(1) as pool:
        pool.submit(streaming.close).result()
    _while_another_thread_uses(model, lambda: _same(model, expected))


@torch.no_grad()
def test_a_copy_made_inside_use_experts_sees_no_later_ones_of_its_original():
    model = causal()
    expected = model(tokens()).logits
    with model.use_experts("expert_1"):
        copied = copy.deepcopy(model)
    with model.use_experts("expert_2"):
        _same(copied, expected)


def _same(model, expected):
    assert torch.equal(model(tokens()).logits, expected)


def _while_another_thread_uses(model, call):
    entered, done = threading.Event(), threading.Event()

    def use():
        with model.use_experts("expert_3"):
            entered.set()
            done.wait()

    thread = threading.Thread(target=use)
    thread.start()
    entered.wait()
    try:
        call()
    finally:
        done.set()
        thread.join()


def test_a_compiled_model_that_saw_targets_alone_still_learns_from_labels():
    """At sequence level the experts' gradients were all 0 then."""
    torch._dynamo.reset()
    model = causal(router_scope="model", routing_level="sequence").train()
    compiled = torch.compile(model, backend="aot_eager")
    ids = tokens()
    mask = (torch.arange(ids.shape[1]) < 4).expand_as(ids)
    inputs = dict(input_ids=ids, router_mask=mask, expert_targets=torch.tensor([0, 3]))
    compiled(**inputs).loss.backward()
    model.zero_grad()
    compiled(**inputs, labels=ids).loss.backward()
    assert all(bool(factor.weight.grad.any()) for factor in model.moelora.factors())
