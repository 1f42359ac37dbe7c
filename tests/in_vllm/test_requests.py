"""What single requests decide: which experts act, and that their routing can be had."""

from __future__ import annotations

import pytest
import torch
from in_vllm.served import (
    engine,
    generated,
    largest_difference,
    params,
    prompts,
    served,
    shut,
    tiny_mixture,
)
from vllm.exceptions import VLLMValidationError

from moelora.config import NO_EXPERT

TOLERANCE = 1e-4
LEVELS = {
    "token": dict(num_shared_experts=1),
    "layer": dict(router_scope="layer"),
    "sequence": dict(routing_level="sequence", null_expert=True),
}
WEIGHTS = [0.5, 0.0, -0.25, 1.5]


@pytest.mark.parametrize("fields", LEVELS.values(), ids=LEVELS)
def test_each_request_decides_for_itself(fields, tmp_path):
    mixture = tiny_mixture(tmp_path, **fields)
    rows = prompts()[2:6]
    with mixture.use_experts("expert_1"):
        one = generated(mixture, rows)
    asked = {
        "mixture": ({}, {}),
        "banned": ({"banned_experts": "expert_0"}, {"banned_experts": ["expert_0"]}),
        "weights": ({"expert_weights": WEIGHTS}, {"expert_weights": torch.tensor(WEIGHTS)}),
        "base": ({"expert_weights": [0, 0, 0, 0]}, {"expert_weights": torch.zeros(4)}),
    }
    expected = {name: generated(mixture, rows, **own) for name, (_, own) in asked.items()}
    expected["one"] = one
    texts = {tuple(own[2].tokens) for own in expected.values()}
    assert len(texts) == len(expected)
    extra = {name: own for name, (own, _) in asked.items()} | {"one": {"use_experts": "expert_1"}}
    llm = engine(tmp_path)
    try:
        # All in one batch, in turns: the four places of the engine hold requests of each kind.
        order = [(name, i) for i in range(len(rows)) for name in extra]
        given = [params(**extra[name]) for name, _ in order]
        answers = served(llm, [rows[i] for _, i in order], given)
        for name, own in expected.items():
            found = [answer for (asker, _), answer in zip(order, answers) if asker == name]
            assert largest_difference(found, own) <= TOLERANCE, name
    finally:
        shut(llm)


def test_routers_that_read_a_context_are_given_it(tmp_path):
    options = dict(router="context", router_options={"context_size": 3})
    mixture = tiny_mixture(tmp_path, **options)
    contexts = [[1.0, 0.0, -2.0], [-3.0, 0.5, 1.0]]
    rows = prompts()[3:5]
    expected = []
    for row, context in zip(rows, contexts):
        expected += generated(mixture, [row], router_context=torch.tensor([context]))
    llm = engine(tmp_path)
    try:
        given = [params(router_context=context) for context in contexts]
        assert largest_difference(served(llm, rows, given), expected) <= TOLERANCE
        with pytest.raises(VLLMValidationError, match="router_context, which this request lacks"):
            served(llm, rows)
        with pytest.raises(VLLMValidationError, match="a list of 3 numbers"):
            served(llm, rows, params(router_context=[1.0]))
    finally:
        shut(llm)


def test_the_routing_of_a_request_can_be_had(tmp_path):
    mixture = tiny_mixture(tmp_path, null_expert=True)
    row = prompts()[5]
    tokens = generated(mixture, [row])[0].tokens
    report = mixture.route(input_ids=torch.tensor([row + tokens[:-1]]))
    llm = engine(tmp_path)
    try:
        served(llm, [row, prompts()[6]], [params(routing_report="mine"), params()])
        shares = llm.collective_rpc("take_routing_reports")[0]
        assert list(shares) == ["mine"]
        expected = dict(zip(report.choice_names, report.by_sequence[0].tolist()))
        assert shares["mine"] == pytest.approx(expected, abs=1e-6)
        assert NO_EXPERT in shares["mine"]
        assert llm.collective_rpc("take_routing_reports") == [{}]
    finally:
        shut(llm)


REFUSED = {
    "unknown experts": ({"use_experts": "nobody"}, "nobody"),
    "both": ({"use_experts": "expert_1", "expert_weights": WEIGHTS}, "give one of them"),
    "wrong count": ({"expert_weights": [1.0]}, "a list of 4 numbers"),
    "not finite": ({"expert_weights": [float("nan"), 0, 0, 0]}, "expert_weights"),
    "all banned": ({"banned_experts": [f"expert_{i}" for i in range(4)]}, "leave one at least"),
    "used and banned": ({"use_experts": "expert_1", "banned_experts": "expert_1"}, "drop one"),
    "a context": ({"router_context": [1.0]}, "drop it"),
    "no name": ({"routing_report": 3}, "routing_report"),
}


def test_what_cannot_be_is_refused_and_the_engine_goes_on(tmp_path):
    mixture = tiny_mixture(tmp_path)
    rows = prompts()[:2]
    expected = generated(mixture, rows)
    llm = engine(tmp_path)
    try:
        for given, message in REFUSED.values():
            with pytest.raises(VLLMValidationError, match=message):
                served(llm, rows, params(**given))
        assert largest_difference(served(llm, rows), expected) <= TOLERANCE
    finally:
        shut(llm)


def test_shared_prefixes_and_own_choices_do_not_go_together(tmp_path):
    tiny_mixture(tmp_path)
    llm = engine(tmp_path, enable_prefix_caching=True)
    try:
        with pytest.raises(VLLMValidationError, match="--no-enable-prefix-caching"):
            served(llm, prompts()[:1], params(use_experts="expert_1"))
        served(llm, prompts()[:1], params(routing_report="allowed"))
    finally:
        shut(llm)
