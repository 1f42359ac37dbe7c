"""Two processes on half a batch each have the gradients, counts and errors of one process on the
whole.
"""

from __future__ import annotations

import pytest
import torch
from training.processes import CASES, in_two_processes, run_case, run_static_graph, worker
from training.runs import assert_same, only_routers

# Two optimizer steps, the second on what the first left.
TWO_STEPS = 1e-5
SAME = [n for n in CASES if "classifier" not in n and n != "no_callback"]


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """What each of two processes found in every case."""
    return in_two_processes(worker, tmp_path_factory.mktemp("two"))


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The same in this process, on whole batches."""
    folder = tmp_path_factory.mktemp("alone")
    return {name: run_case(name, 1, folder) for name in CASES}


@pytest.mark.parametrize("name", SAME)
def test_two_processes_have_the_gradients_of_one(name, two, alone):
    for found in two:
        assert len(found[name]["gradients"]) == 2
        for gradient, expected in zip(found[name]["gradients"], alone[name]["gradients"]):
            assert_same(gradient, expected, TWO_STEPS)


@pytest.mark.parametrize("name", [*SAME, "classifier"])
def test_all_processes_count_the_tokens_of_all(name, two, alone):
    for found in two:
        assert all(torch.equal(a, b) for a, b in zip(found[name]["counts"], alone[name]["counts"]))
        assert torch.equal(found[name]["bias"], alone[name]["bias"])
    assert float(alone["token"]["bias"].abs().max()) > 0


def _router_losses_own(found):
    """With less without: transformers scales a classifier's own loss by the world size."""
    lossy, lossless = (found[n]["gradients"][0] for n in ("classifier", "lossless_classifier"))
    return {name: lossy[name] - lossless[name] for name in only_routers(lossy)}


def test_a_classifiers_router_losses_are_those_of_one_process(two, alone):
    expected = _router_losses_own(alone)
    assert all(g.abs().max() > 1e-3 for g in expected.values())
    for found in two:
        assert_same(_router_losses_own(found), expected, TWO_STEPS)


def test_a_loss_outside_of_the_model_needs_the_callback(two, alone):
    assert "gradients" in alone["no_callback"]
    for found in two:
        assert "MoeLoraCallback" in found["no_callback"]["error"]


def test_a_static_graph_keeps_the_outputs_and_the_gradients(two):
    expected, found = run_static_graph(0, 1), [one["static_graph"] for one in two]
    for one in found:
        assert one["class"] == expected["class"] == "MoeLoraCausalLMOutputWithPast"
        assert_same(one["gradients"], expected["gradients"])
    # Each process's share of the same sum, and of the same rows.
    torch.testing.assert_close(sum(one["aux"] for one in found), expected["aux"])
    logits = torch.cat([one["logits"] for one in found], dim=1)
    torch.testing.assert_close(logits, expected["logits"], rtol=1e-5, atol=1e-6)
