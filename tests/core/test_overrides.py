"""Who decides instead of the router: use_experts with bans, and expert_weights from outside."""

from __future__ import annotations

import pytest
import torch
from bases import causal_base, classifier_base
from core.mixtures import LEVELS, SCOPES, adapted, causal, classifier, factors, left_padded, tokens
from torch import nn

PROMPT, NEW = 7, 4
GREEDY = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}
WAYS = {
    "greedy": GREEDY,
    "without cache": {**GREEDY, "use_cache": False},
    "beams": {**GREEDY, "num_beams": 3, "num_return_sequences": 2},
    "sampling": {**GREEDY, "do_sample": True, "num_return_sequences": 3},
    "beam sampling": {**GREEDY, "do_sample": True, "num_beams": 2},
}
CLOSE = {"rtol": 1e-4, "atol": 2e-5}
# For each of two sequences; one that uses a single expert, and a negative weight.
EACH = torch.tensor([[0.0, 1.0, 0.0, 0.0], [0.5, 0.0, -0.25, 1.5]])
NAMES = [f"expert_{e}" for e in range(4)]


def _base(name):
    return classifier_base(name) if name == "bert" else causal_base(name)


def _mixture(name, **fields):
    return classifier(name, **fields) if name == "bert" else causal(name, **fields)


def _by_hand(name, model, weights):
    """The base with Σ w s B A added to its weights, Conv1D's transposed."""
    base = _base(name)
    for e, weight in enumerate(weights.tolist()):
        for linear, (A, B) in factors(model, e).items():
            site, i = adapted(model)[linear]
            module = base.get_submodule(linear)
            delta = weight * site.lora_B[i].scaling[e] * B @ A
            with torch.no_grad():
                module.weight += delta if isinstance(module, nn.Linear) else delta.T
    return base


def _generate(model, way, **inputs):
    torch.manual_seed(0)
    return model.generate(**inputs, **WAYS[way])


def _named(weights):
    return dict(zip(NAMES, weights.tolist()))


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("scope", SCOPES)
@torch.no_grad()
def test_weights_for_all_are_those_of_use_experts(scope, level):
    model = causal(router_scope=scope, routing_level=level)
    for weights in EACH:
        with model.use_experts(_named(weights)):
            expected = model(tokens()).logits
        torch.testing.assert_close(model(tokens(), expert_weights=weights).logits, expected)
        rows = weights.expand(2, 10, -1)
        for form in (rows[:, 0], rows, rows.double()):
            torch.testing.assert_close(model(tokens(), expert_weights=form).logits, expected)


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
@pytest.mark.parametrize("scope", SCOPES)
@torch.no_grad()
def test_each_sequence_is_the_base_with_its_own_mixture_merged(name, scope):
    model, inputs = (
        _mixture(name, router_scope=scope),
        left_padded([tokens(1, 9)[0], tokens(1, 6, seed=4)[0]]),
    )
    logits = model(**inputs, expert_weights=EACH).logits
    for i, weights in enumerate(EACH):
        expected = _by_hand(name, model, weights)(**inputs).logits
        present = inputs["attention_mask"][i].bool() if name != "bert" else ...
        torch.testing.assert_close(logits[i][present], expected[i][present], **CLOSE)


@pytest.mark.parametrize("scope", SCOPES)
@torch.no_grad()
def test_each_token_may_have_its_own_weights(scope):
    """Causality tells tokens apart: up to where the weights change, logits are those of the first
    weights.
    """
    model, ids = causal(router_scope=scope), tokens()
    weights = EACH[0].repeat(2, 10, 1)
    weights[:, 6:] = EACH[1]
    logits = model(ids, expert_weights=weights).logits
    first = model(ids, expert_weights=EACH[0]).logits
    torch.testing.assert_close(logits[:, :6], first[:, :6])
    assert not torch.allclose(logits[:, 6:], first[:, 6:], atol=1e-3)
    # Token by token with the cache, each step with its own weights.
    outputs, steps = model(ids[:, :6], expert_weights=weights[:, :6], use_cache=True), []
    for t in range(6, 10):
        cache = outputs.past_key_values
        outputs = model(
            ids[:, t : t + 1], expert_weights=weights[:, t], past_key_values=cache, use_cache=True
        )
        steps.append(outputs.logits[:, -1])
    torch.testing.assert_close(torch.stack(steps, 1), logits[:, 6:], **CLOSE)


def test_a_linear_that_reads_something_else_than_tokens_takes_no_weights_of_tokens():
    """BERT's pooler reads the first token of each sequence."""
    model = classifier("bert")
    with pytest.raises(ValueError, match=r"20 rows.*\(2, 32\).*\[2, E\]"):
        model(tokens(), expert_weights=EACH[1].expand(2, 10, -1))
    model = classifier("bert", target_modules=["query", "value"])
    expected = model(tokens(), expert_weights=EACH).logits
    got = model(tokens(), expert_weights=EACH[:, None].expand(-1, 10, -1)).logits
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "name,level", [("llama", "token"), ("llama", "sequence"), ("gpt2", "token")]
)
def test_generation_carries_each_prompt_s_weights(name, level, way):
    model = causal(name, routing_level=level)
    inputs = left_padded([tokens(1, PROMPT)[0], tokens(1, 4, seed=4)[0]])
    got = _generate(model, way, **inputs, expert_weights=EACH)
    assert not torch.equal(got, _generate(model, way, **inputs, expert_weights=EACH.flip(0)))
    by_token = EACH[:, None].repeat(1, PROMPT, 1)
    assert torch.equal(_generate(model, way, **inputs, expert_weights=by_token), got)
    embedded = {**inputs, "inputs_embeds": model.get_input_embeddings()(inputs["input_ids"])}
    del embedded["input_ids"]
    assert torch.equal(_generate(model, way, **embedded, expert_weights=by_token), got[:, PROMPT:])
    with model.use_experts(_named(EACH[0])):
        expected = _generate(model, way, **inputs)
    assert torch.equal(_generate(model, way, **inputs, expert_weights=EACH[0]), expected)
    if "sampling" not in way:
        per_prompt = len(got) // 2
        for i, weights in enumerate(EACH):
            rows = slice(i * per_prompt, (i + 1) * per_prompt)
            expected = _generate(_by_hand(name, model, weights), way, **inputs)
            assert torch.equal(got[rows], expected[rows])


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "mamba"])
def test_new_tokens_have_the_weights_of_the_prompt_s_last_one(name):
    model, ids = causal(name), tokens(2, PROMPT)
    weights = torch.randn(2, PROMPT, 4)
    new = model.generate(
        ids, expert_weights=weights, return_dict_in_generate=True, output_logits=True, **GREEDY
    )
    whole = torch.cat([weights, weights[:, -1:].expand(-1, NEW, -1)], 1)
    expected = model(new.sequences, expert_weights=whole).logits[:, PROMPT - 1 : -1]
    torch.testing.assert_close(torch.stack(new.logits, 1), expected, **CLOSE)
    others = [{"use_cache": False}, *([] if name == "mamba" else [{"prefill_chunk_size": 3}])]
    for settings in others:
        got = model.generate(ids, expert_weights=weights, **GREEDY, **settings)
        assert torch.equal(got, new.sequences)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("assistant", ["a plain model", "a mixture", "the prompt"])
def test_assisted_generation_is_the_unassisted_one(assistant, level):
    model, row = causal(routing_level=level), torch.cat([tokens(1, 4), tokens(1, 4)], 1)
    helpers = {
        "a plain model": lambda: causal_base(seed=1),
        "a mixture": lambda: causal(num_experts=3),
    }
    helper = helpers[assistant]() if assistant in helpers else None
    help_ = {"prompt_lookup_num_tokens": 2} if helper is None else {"assistant_model": helper}
    for forced in ({"expert_weights": torch.randn(1, 8, 4)}, {"banned_experts": NAMES[:2]}):
        settings = {**GREEDY, "max_new_tokens": 9, "min_new_tokens": 9, **forced}
        assert torch.equal(
            model.generate(row, **help_, **settings), model.generate(row, **settings)
        )


@pytest.mark.parametrize("kind", [None, {"use_reentrant": False}, {"use_reentrant": True}], ids=str)
@pytest.mark.parametrize("scope", SCOPES)
def test_gradients_reach_an_outside_gate_and_recomputation_sees_the_same_weights(scope, kind):
    model, ids = causal(router_scope=scope, router_aux_loss_coef=0.5).train(), tokens()
    # One that is not used has a gradient too: what using it would do.
    gate = torch.tensor([[0.5, -1.0, 0.0, 2.0], [1.0, 0.0, 0.3, 0.0]], requires_grad=True)

    def gradients():
        model.zero_grad()
        gate.grad = None
        output = model(ids, labels=ids, expert_weights=gate.tanh())
        assert not hasattr(output, "expert_aux_loss"), "the routers did nothing"
        output.loss.backward()
        rows = [
            p.grad.clone()
            for n, p in model.named_parameters()
            if p.requires_grad and "router" not in n
        ]
        assert all(p.grad is None for p in model.moelora.routers.parameters())
        return [gate.grad.clone(), *rows]

    expected = gradients()
    if kind is not None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kind)
    for got, want in zip(gradients(), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)
    with torch.no_grad():
        steps = torch.zeros_like(gate)
        for i in range(gate.numel()):
            shift = torch.zeros(gate.numel()).scatter_(0, torch.tensor([i]), 1e-2).view_as(gate)
            losses = [
                model(ids, labels=ids, expert_weights=(gate + s).tanh()).loss
                for s in (shift, -shift)
            ]
            steps.view(-1)[i] = (losses[0] - losses[1]) / 2e-2
    torch.testing.assert_close(expected[0], steps, rtol=3e-2, atol=1e-3)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("scope", SCOPES)
@torch.no_grad()
def test_a_banned_expert_is_as_if_its_router_row_were_not_there(scope, level):
    model, ids = causal(router_scope=scope, routing_level=level), tokens()
    free = model(ids, output_expert_routing=True)
    assert any((r.expert_ids == 1).any() for r in free.expert_routing)
    got = model(ids, banned_experts=["expert_1"], output_expert_routing=True)
    for routing in got.expert_routing:
        rest = routing.logits[:, [0, 2, 3]]
        top = rest.topk(2)
        assert torch.equal(routing.expert_ids, torch.tensor([0, 2, 3])[top.indices])
        torch.testing.assert_close(routing.expert_weights, top.values.softmax(-1))
        assert bool((routing.logits[:, 1] == -torch.inf).all())
    with model.use_experts(ban="expert_1"):
        assert torch.equal(model(ids).logits, got.logits)
    assert torch.equal(model(ids).logits, free.logits)
    model.remove_expert("expert_1")
    torch.testing.assert_close(model(ids).logits, got.logits)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("rate", [0.0, 0.1])
def test_with_fewer_than_k_left_the_other_slots_are_empty_and_generation_goes_on(rate, level):
    model, ids = causal(routing_level=level, router_bias_update_rate=rate), tokens(2, PROMPT)
    model.moelora.load.bias[:, 0] = 5.0  # What balancing adds may not bring a banned expert back.
    with model.use_experts(ban=NAMES[:2]), model.use_experts(ban="expert_3"):
        chosen = model.route(input_ids=ids)
        assert torch.equal(chosen.expert_share, torch.tensor([0.0, 0.0, 1.0, 0.0]))
        assert all(
            (r.expert_ids.sort(1).values == torch.tensor([-1, 2])).all() for r in chosen.routing
        )
        got = model.generate(ids, **GREEDY)
    assert torch.equal(
        model.generate(ids, banned_experts=[NAMES[0], NAMES[1], NAMES[3]], **GREEDY), got
    )
    assert torch.equal(
        model.generate(ids, expert_weights=torch.tensor([0.0, 0.0, 1.0, 0.0]), **GREEDY), got
    )


def test_training_under_a_ban_leaves_the_banned_expert_without_gradient():
    model, ids = causal(router_aux_loss_coef=0.5, router_z_loss_coef=0.1).train(), tokens()
    outputs = model(ids, labels=ids, banned_experts="expert_2", expert_targets=torch.tensor([0, 3]))
    outputs.loss.backward()
    assert bool(outputs.expert_aux_loss.isfinite())
    for linear, gradients in factors(model, 2, of=lambda weight: weight.grad).items():
        assert not any(bool(gradient.any()) for gradient in gradients), linear
    for router in model.moelora.routers.values():
        assert not router.weight.grad[2].any() and bool(router.weight.grad[[0, 1, 3]].any(1).all())


WRONG = {
    "expert_weights has shape (3,)": {"expert_weights": torch.ones(3)},
    "expert_weights has shape (3, 4)": {"expert_weights": torch.ones(3, 4)},
    "expert_weights has shape (2, 9, 4)": {"expert_weights": torch.ones(2, 9, 4)},
    "contains NaN or Inf": {"expert_weights": torch.tensor([1.0, float("nan"), 0.0, 0.0])},
    "There is no expert 'law'. The experts are: expert_0, expert_1, expert_2, expert_3": {
        "banned_experts": ["expert_1", "law"]
    },
    "All experts are banned": {"banned_experts": NAMES},
    "expert_1 would be used and is banned": {
        "expert_weights": EACH[0],
        "banned_experts": "expert_1",
    },
    "drop it or expert_targets": {
        "expert_weights": EACH[0],
        "expert_targets": torch.tensor([0, 1]),
    },
    "expert 3, which is banned": {
        "banned_experts": "expert_3",
        "expert_targets": torch.tensor([0, 3]),
    },
}


@pytest.mark.parametrize("message", WRONG)
def test_what_cannot_be_is_refused(message):
    model = causal()
    with pytest.raises(ValueError) as error:
        model(tokens(), **WRONG[message])
    assert message in str(error.value)
    if "expert_targets" not in WRONG[message]:
        with pytest.raises(ValueError):
            model.generate(
                tokens(), **WRONG[message], **{**GREEDY, "num_return_sequences": 2, "num_beams": 2}
            )


def test_what_is_no_tensor_and_a_routing_beside_weights_are_refused():
    model = causal(routing_level="sequence")
    with pytest.raises(TypeError, match="expert_weights is a list"):
        model(tokens(), expert_weights=[1.0, 0.0, 0.0, 0.0])
    with pytest.raises(ValueError, match="drop it or expert_routing"):
        model(tokens(), expert_weights=EACH[0], expert_routing=model(tokens()).expert_routing)


def test_use_experts_refuses_and_leaves_nothing_behind():
    model = causal()
    for words, message in (
        (((), {}), "names nothing"),
        ((([],), {}), "names nothing"),
        ((("expert_1",), {"ban": "expert_1"}), "used and is banned"),
        ((({"expert_1": float("inf")},), {}), "weight of expert 'expert_1'"),
        (((), {"ban": "law"}), "expert_0, expert_1"),
    ):
        with pytest.raises(ValueError, match=message), model.use_experts(*words[0], **words[1]):
            pass
    inside = (model.use_experts(ban="expert_1"), model.use_experts("expert_1"))
    with pytest.raises(ValueError, match="banned"), inside[0], inside[1]:
        pass
    assert not model.moelora.overridden and not model.moelora.overrides_entered
