"""Bottleneck, series and block experts: exact, and at home wherever LoRA experts are."""

from __future__ import annotations

import copy
import threading
from concurrent.futures import ThreadPoolExecutor

import accelerate
import pytest
import torch
from bases import causal_base
from core.adapter_forms import FFN, FORMS, PHI, Plain, form, made
from core.mixtures import LEVELS, left_padded, own_parameters, tokens
from training.runs import batch, gradients_of, open_window

import moelora
from moelora import MoeLoraForCausalLM
from moelora.training.router_init import initialise

LOSSES = {"router_aux_loss_coef": 0.5, "router_z_loss_coef": 0.1}
# The products of the three paths of eager: all experts, few of many, ranks that are padded.
PATHS = {
    "dense": {},
    "grouped": {"num_experts": 9},
    "sequence": {"num_experts": 64, "r": 1},
    "mixed ranks": {"num_experts": 9, "r": [1, 2, 3] * 3},
}


def _exact(name, kind, activation, **fields):
    """Logits and every gradient are those of the plain computation in float64."""
    model = made(name, kind, activation, base=causal_base(name).double(), **fields).double()
    twin = Plain(causal_base(name).double(), model)
    ids = tokens()
    ours = model(ids).logits
    theirs = twin.base(ids).logits
    assert (theirs - causal_base(name).double()(ids).logits).abs().max() > 1e-3
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-10)
    cotangent = torch.randn(ours.shape, dtype=ours.dtype)
    (ours * cotangent).sum().backward()
    (theirs * cotangent).sum().backward()
    parameters = own_parameters(model)
    assert {id(p) for p in twin.leaves} == {id(p) for p in parameters.values()}
    for key, parameter in parameters.items():
        expected = twin.leaves[parameter].grad
        torch.testing.assert_close(parameter.grad, expected, rtol=1e-7, atol=1e-9, msg=key)


@pytest.mark.parametrize("kind", FORMS)
@pytest.mark.parametrize("name", FFN)
def test_logits_and_every_gradient_are_those_of_plain_autograd(name, kind):
    _exact(name, kind, "tanh")


@pytest.mark.parametrize("activation", PHI)
@pytest.mark.parametrize("kind", ["bottleneck", "series"])
def test_every_activation_is_exact(activation, kind):
    _exact("llama", kind, activation)


@pytest.mark.parametrize("path", PATHS)
def test_every_path_takes_an_activation(path):
    _exact("llama", "block", "gelu", **PATHS[path])


@torch.no_grad()
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("kind", ["bottleneck", "series"])
def test_without_gradients_the_logits_are_the_same(kind, path):
    """The products of single tokens, and outputs that are written in place."""
    model = made("llama", kind, "silu", **PATHS[path])
    ids = tokens(1, 6)
    with torch.enable_grad():
        whole = model(ids).logits.detach()
    torch.testing.assert_close(model(ids).logits, whole, rtol=1e-4, atol=1e-5)
    cache = None
    for place in range(ids.shape[1]):
        out = model(ids[:, place : place + 1], past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        torch.testing.assert_close(out.logits[:, 0], whole[:, place], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", FORMS)
@pytest.mark.parametrize("name", FFN)
def test_a_new_mixture_is_the_base_bit_for_bit_and_comes_out_again(name, kind):
    ids = tokens()
    base = causal_base(name).train()
    torch.manual_seed(5)
    expected = base(ids).logits
    model = made(name, kind, active=False, base=base).train()
    torch.manual_seed(5)
    assert torch.equal(model(ids).logits, expected)
    again = model.unload()
    assert again is base
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in again.modules())
    assert not any("moelora" in key for key in again.state_dict())


@pytest.mark.parametrize("kind", ["bottleneck", "series", "block"])
def test_autocast_is_near_fp32_and_gradients_reach_everything(kind):
    model = made("opt", kind)
    ids = tokens()
    expected = model(ids).logits
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(ids).logits
    (logits.float() ** 2).sum().backward()
    assert (logits.float() - expected).abs().max() < 0.05 * expected.abs().max()
    assert all(bool(p.grad.isfinite().all()) for p in own_parameters(model).values())


@pytest.mark.parametrize("kind", ["bottleneck", "series", "block"])
def test_a_bf16_base(kind):
    model = made("bloom", kind, base=causal_base("bloom").bfloat16())
    assert {p.dtype for p in own_parameters(model).values()} == {torch.float32}
    expected = made("bloom", kind)(tokens()).logits
    logits = model(tokens()).logits
    assert logits.dtype == torch.bfloat16
    assert (logits.float() - expected).abs().max() < 0.1 * expected.abs().max()


@pytest.mark.parametrize("scope", ["site", "layer"])
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("kind", ["series", "block"])
def test_generation_with_the_cache_is_generation_without(kind, level, scope):
    model = made("opt", kind, routing_level=level, router_scope=scope)
    inputs = left_padded([tokens(1, 9)[0], tokens(1, 6, seed=4)[0]])
    settings = {"max_new_tokens": 4, "do_sample": False, "num_beams": 2}
    cached = model.generate(**inputs, **settings)
    if level == "token":
        assert torch.equal(model.generate(**inputs, **settings, use_cache=False), cached)
    single = model.generate(tokens(1, 6, seed=4), **settings)
    assert torch.equal(cached[1, 9:], single[0, 6:])


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("scope", ["site", "layer"])
@pytest.mark.parametrize("kind", ["series", "both"])
def test_gradient_checkpointing_gives_the_same_gradients(kind, scope, reentrant):
    model = made("opt", kind, router_scope=scope, **LOSSES).train()
    results = []
    for enabled in (False, True):
        if enabled:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.zero_grad()
        open_window(model)
        torch.manual_seed(0)
        model(**batch()).loss.backward()
        results.append(gradients_of(model))
    for key, expected in results[0].items():
        assert bool(expected.any()), key
        torch.testing.assert_close(results[1][key], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name, kind", [("llama", "series"), ("opt", "block")])
def test_compiled_gradients(name, kind):
    torch._dynamo.reset()
    model = made(name, kind, **LOSSES).train()
    compiled = torch.compile(model, backend="aot_eager")
    results = []
    for call in (model, compiled):
        model.zero_grad()
        open_window(model)
        torch.manual_seed(0)
        call(**batch()).loss.backward()
        results.append(gradients_of(model))
    for key, expected in results[0].items():
        torch.testing.assert_close(results[1][key], expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["series", "both"])
def test_offloaded(kind):
    model = made("opt", kind)
    expected = model(tokens()).logits
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    assert torch.equal(model(tokens()).logits, expected)


@pytest.mark.parametrize("kind", ["series", "both"])
def test_put_into_an_offloaded_base(kind):
    base = causal_base("opt")
    expected = base(tokens()).logits
    accelerate.cpu_offload(base, execution_device=torch.device("cpu"))
    model = MoeLoraForCausalLM.from_base(
        base, moelora.MoeLoraConfig(num_experts=4, **form("opt", kind))
    )
    assert torch.equal(model(tokens()).logits, expected)


@pytest.mark.parametrize("kind", ["series", "block"])
def test_a_part_of_the_model_called_alone(kind):
    """A linear or a block finds its way; a span needs the pass, and says so."""
    model = made("llama", kind)
    ids = tokens()
    assert torch.equal(
        model.model(ids).last_hidden_state @ model.lm_head.weight.T, model(ids).logits
    )
    span = made("opt", "block")
    x = torch.randn(2, 32)
    layer = span.model.decoder.layers[0]
    with pytest.raises(RuntimeError, match=r"fc2.*Call the model itself"):
        layer.fc2(layer.fc1(x))
    span(ids)


@pytest.mark.parametrize("kind", ["series", "block"])
def test_routers_read_what_their_experts_read(kind):
    model = made("llama", kind)
    block = model.model.layers[0].mlp
    seen = []
    module = block.down_proj if kind == "series" else block
    module.register_forward_hook(
        lambda m, args, out: seen.append(out.clone() if kind == "series" else args[0]), prepend=True
    )
    routing = model(tokens(), output_expert_routing=True).expert_routing
    names = model.moelora.router_names
    place = next(i for i, n in enumerate(names) if n.startswith("model.layers.0.mlp"))
    x = seen[0].reshape(-1, 32)
    weight = model.moelora.router_list[place].weight
    torch.testing.assert_close(routing[place].logits, x @ weight.T)


@pytest.mark.parametrize("kind", ["series", "block"])
def test_routers_that_begin_at_prototypes(kind):
    """Texts are read where the router reads: in series an output, of a span its input."""
    model = made("opt", kind)
    generator = torch.Generator().manual_seed(1)
    texts = {
        f"expert_{e}": [torch.randint(3 + 15 * e, 18 + 15 * e, (1, 40), generator=generator)]
        for e in range(4)
    }
    initialise(model, "prototype", texts)
    found = [model.route(input_ids=own[0]).probabilities.mean(0).argmax() for own in texts.values()]
    assert found == [0, 1, 2, 3]


@torch.no_grad()
@pytest.mark.parametrize("kind", ["series", "both"])
def test_experts_come_and_go(kind):
    model = made("opt", kind)
    with model.use_experts("expert_1"):
        expected = model(tokens()).logits
    model.add_expert("law", copy_of="expert_1")
    model.remove_expert("expert_0")
    model.freeze_experts("expert_1")
    for name in ("expert_1", "law"):
        with model.use_experts(name):
            torch.testing.assert_close(model(tokens()).logits, expected, rtol=1e-5, atol=1e-5)
    model.add_expert("fresh")
    with model.use_experts("fresh"):
        assert torch.equal(model(tokens()).logits, causal_base("opt")(tokens()).logits)


def test_in_series_no_hook_and_no_gradient_sees_an_output_change():
    model = made("llama", "series")
    kept = []
    down = model.model.layers[0].mlp.down_proj
    down.register_forward_hook(lambda m, args, out: kept.append((out, out.clone())), prepend=True)
    with torch.no_grad():
        expected = model(tokens()).logits
    logits = model(tokens()).logits
    logits.sum().backward()
    torch.testing.assert_close(logits, expected)
    assert all(torch.equal(*pair) for pair in kept)


def test_a_block_that_gives_more_than_a_tensor_later_is_told():
    model = made("llama", "block")
    block = model.model.layers[0].mlp
    forward = block.forward
    block.forward = lambda x: (forward(x), None)
    with pytest.raises(TypeError, match=r"layers\.0\.mlp gave a tuple"):
        model(tokens())


def test_threads_do_not_mix_what_spans_read():
    model = made("opt", "both")
    inputs = [tokens(1 + i % 2, 4 + i, seed=i) for i in range(4)]
    with torch.no_grad():
        expected = [model(ids).logits for ids in inputs]
    meet = threading.Barrier(len(inputs))

    @torch.no_grad()
    def work(number):
        meet.wait()
        return [model(inputs[number]).logits for _ in range(4)]

    with ThreadPoolExecutor(len(inputs)) as pool:
        for own, several in zip(expected, pool.map(work, range(len(inputs)))):
            assert all(torch.equal(logits, own) for logits in several)


def test_an_error_inside_of_a_span_leaves_nothing_for_the_next_pass():
    model = made("opt", "block")
    expected = model(tokens()).logits
    layer = model.model.decoder.layers[0]
    handle = layer.fc2.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(tokens(1, 4))
    handle.remove()
    assert torch.equal(model(tokens()).logits, expected)


@torch.no_grad()
def test_copied_and_pickled_models_keep_their_forms(tmp_path):
    for kind in ("series", "both"):
        model = made("opt", kind)
        expected = model(tokens()).logits
        again = copy.deepcopy(model)
        model.unload()
        assert torch.equal(again(tokens()).logits, expected)
        torch.save(again, tmp_path / "model")
        loaded = torch.load(tmp_path / "model", weights_only=False)
        assert torch.equal(loaded(tokens()).logits, expected)
