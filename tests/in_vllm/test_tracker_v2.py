"""The tracker of vLLM's V2 runner: whose rows a batch has, when requests come, go and come back."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from moelora.vllm.requests import KEY
from moelora.vllm.tracker_v2 import TrackerV2, state_class


class State:
    """What the tracker's class stands before: a state that notes what it is told."""

    def __init__(self, vllm_config, model):
        self.told = []

    def add_request(self, req_index, new_req_data):
        self.told.append(("add", req_index))

    def remove_request(self, req_id):
        self.told.append(("remove", req_id))

    def prepare_inputs(self, input_batch, req_states):
        return {"positions": "real"}

    def prepare_dummy_inputs(self, num_reqs, num_tokens):
        return {"positions": "dummy"}


def config():
    context = {}
    return SimpleNamespace(compilation_config=SimpleNamespace(static_forward_context=context))


def new(name, length=3):
    return SimpleNamespace(req_id=name, prompt_len=length, sampling_params=name)


def batch(names, starts, before):
    return SimpleNamespace(
        # More places than requests, as vLLM has them.
        req_ids=names,
        num_reqs=len(names),
        query_start_loc_np=np.array([*starts, starts[-1]]),
        num_computed_tokens_np=np.array(before),
    )


def test_rows_are_those_of_the_batch_s_requests():
    read = partial(SimpleNamespace, report=None)
    state = state_class(State, lambda name: read(name=name))(config(), None)
    tracker = state.tracker
    assert tracker.rows(None) == []
    for i, name in enumerate(("a-1", "b-2")):
        state.add_request(i, new(name))
    found = state.prepare_inputs(batch(["b-2", "a-1"], [0, 3, 4], [0, 7]), None)
    assert found == {"positions": "real"}
    rows = tracker.rows(None)
    assert [(r.start, r.stop, r.before) for r in rows] == [(0, 3, 0), (3, 4, 7)]
    assert [r.request.choice.name for r in rows] == ["b-2", "a-1"]
    assert state.prepare_dummy_inputs(2, 4) == {"positions": "dummy"}
    assert tracker.rows(None) == []
    state.remove_request("a-1")
    assert [request.choice.name for request in tracker.under_way()] == ["b-2"]
    assert state.told == [("add", 0), ("add", 1), ("remove", "a-1")]


def test_a_request_that_vllm_did_not_tell_of_raises():
    tracker = TrackerV2(config(), str.upper)
    tracker.add(new("a-1"))
    tracker.batch = batch(["a-1", "b-2"], [0, 3, 4], [0, 7])
    with pytest.raises(RuntimeError, match="'b-2' and told the model's state of no such request"):
        tracker.rows(None)


def test_vllm_s_own_requests_have_no_rows_and_decide_nothing():
    def read(params):
        raise ValueError("this request lacks what the router reads")

    tracker = TrackerV2(config(), read)
    tracker.add(new("_v2_mixed_warmup_decode_"))
    tracker.batch = batch(["_v2_mixed_warmup_decode_"], [0, 1], [2])
    assert tracker.rows(None) == [] and not list(tracker.under_way())


def test_what_a_request_counted_outlives_it():
    made = config()
    tracker = TrackerV2(made, lambda name: SimpleNamespace(report=name))
    assert made.compilation_config.static_forward_context == {KEY: tracker}
    # It had to make room, and came back.
    for counts in ([1, 2], [0, 5]):
        tracker.add(new("a-1"))
        tracker.by_id["a-1"].counts[0] = torch.tensor(counts)
        tracker.remove("a-1")
    tracker.remove("unknown")
    assert {name: own.tolist() for name, own in tracker.take_reports().items()} == {"a-1": [1, 7]}
    assert tracker.take_reports() == {}
