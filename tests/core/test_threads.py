"""Threads, tasks and nested calls that use one model each see their own routing."""

from __future__ import annotations

import asyncio
import gc
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from core.mixtures import LEVELS, SCOPES, causal, tokens

from moelora.core.forward_pass import running_pass

THREADS = 6


@pytest.fixture(autouse=True)
def _one_thread_each():
    torch.set_num_threads(1)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("scope", SCOPES)
def test_threads_do_not_mix_their_routings(scope, level):
    model = causal(router_scope=scope, routing_level=level)
    inputs = [tokens(1 + i % 3, 4 + i, seed=i) for i in range(THREADS)]
    with torch.no_grad():
        expected = [model(ids).logits for ids in inputs]
    meet = threading.Barrier(THREADS)

    @torch.no_grad()
    def work(number):
        meet.wait()
        return [model(inputs[number]).logits for _ in range(5)]

    with ThreadPoolExecutor(THREADS) as pool:
        for own, several in zip(expected, pool.map(work, range(THREADS))):
            assert all(torch.equal(logits, own) for logits in several)
    assert running_pass(model.moelora) is None


@pytest.mark.parametrize("level", LEVELS)
def test_threads_generate_side_by_side(level):
    model = causal(routing_level=level)
    inputs = [tokens(1, 4 + i, seed=i) for i in range(THREADS)]
    expected = [model.generate(ids, max_new_tokens=4, do_sample=False) for ids in inputs]
    with ThreadPoolExecutor(THREADS) as pool:
        results = pool.map(
            lambda ids: model.generate(ids, max_new_tokens=4, do_sample=False), inputs
        )
        assert all(torch.equal(a, b) for a, b in zip(expected, results))


@torch.no_grad()
def test_each_thread_uses_the_experts_that_it_entered():
    model = causal()
    ids = tokens()
    names = model.moelora_config.expert_names
    alone = {None: model(ids).logits}
    for name in names:
        with model.use_experts(name):
            alone[name] = model(ids).logits
    meet = threading.Barrier(len(names) + 1)

    @torch.no_grad()
    def work(name):
        if name is None:
            meet.wait()
            return [model(ids).logits for _ in range(5)]
        with model.use_experts(name):
            meet.wait()
            return [model(ids).logits for _ in range(5)]

    with ThreadPoolExecutor(len(names) + 1) as pool:
        for name, several in zip(alone, pool.map(work, alone)):
            assert all(torch.equal(logits, alone[name]) for logits in several), name


def test_what_a_task_starts_in_a_thread_uses_the_tasks_experts():
    model = causal()
    ids = tokens()
    with model.use_experts("expert_2"), torch.no_grad():
        expected = model(ids).logits

    @torch.no_grad()
    def call():
        return model(ids).logits

    async def request(name):
        if name is None:
            await asyncio.sleep(0)
            return await asyncio.to_thread(call)
        with model.use_experts(name):
            await asyncio.sleep(0)
            return await asyncio.to_thread(call)

    async def serve():
        return await asyncio.gather(request("expert_2"), request(None))

    inside, outside = asyncio.run(serve())
    assert torch.equal(inside, expected)
    assert torch.equal(outside, call())


@torch.no_grad()
def test_a_model_called_inside_of_another_has_its_own_pass():
    outer = causal(router_scope="model")
    inner = causal("gpt2", routing_level="sequence")
    expected = outer(tokens()).logits, inner(tokens(3, 5)).logits
    results = []
    layer = outer.model.layers[1]
    handle = layer.register_forward_pre_hook(lambda *_: results.append(inner(tokens(3, 5)).logits))
    assert torch.equal(outer(tokens()).logits, expected[0])
    handle.remove()
    assert torch.equal(results[0], expected[1])


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("level", LEVELS)
def test_a_forward_without_backward_frees_its_graph_at_once(scope, level):
    model = causal(router_scope=scope, routing_level=level, router_prefix_tokens=3).train()
    ids = tokens()
    seen = []
    model.model.norm.register_forward_hook(lambda m, args, out: seen.append(weakref.ref(out)))
    gc.collect()
    gc.disable()
    try:
        outputs = model(ids, labels=ids, router_mask=None)
        del outputs
        assert seen[0]() is None, "a cycle of references keeps the graph"
    finally:
        gc.enable()
