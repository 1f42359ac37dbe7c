"""The backbone called past the model's own forward, as clients do that compute the loss."""

from __future__ import annotations

import copy
import types

import peft
import pytest
import torch
from bases import CAUSAL, causal_base
from core.mixtures import LEVELS, SCOPES, causal, into, tokens
from training.runs import LOSSES, assert_same, batch, gradients_of, open_window

from moelora import MoeLoraForCausalLM
from moelora.core.forward_pass import running_pass


def lean_forward(model):
    """A forward like TRL's: backbone, then the head, then a loss of its own."""
    own = model.forward

    def forward(self, *args, lean=False, labels=None, **kwargs):
        if not lean:
            return own(*args, labels=labels, **kwargs)
        hidden = self.base_model(*args, **kwargs).last_hidden_state
        logits = self.get_output_embeddings()(hidden)[:, :-1].flatten(0, 1).float()
        return torch.nn.functional.cross_entropy(logits, labels[:, 1:].flatten())

    model.forward = types.MethodType(forward, model)


def step(model, lean, inputs):
    """The gradients of one step by the model's forward, or a client's."""
    open_window(model)
    model.train().zero_grad()
    if lean:
        model(**inputs, lean=True).backward()
    else:
        logits = model(**inputs).logits[:, :-1].flatten(0, 1).float()
        torch.nn.functional.cross_entropy(logits, inputs["labels"][:, 1:].flatten()).backward()
    return gradients_of(model)


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("level", LEVELS)
def test_a_clients_forward_has_the_gradients_and_the_load_of_the_models_own(level, scope):
    model = causal(routing_level=level, router_scope=scope, **LOSSES)
    expected = step(model, False, batch())
    counts = model.moelora.load.current.clone()
    other = copy.deepcopy(causal(routing_level=level, router_scope=scope, **LOSSES))
    lean_forward(other)
    assert_same(step(other, True, batch()), expected, 1e-4)
    assert torch.equal(other.moelora.load.current, counts) and int(counts.sum()) > 0
    assert running_pass(other.moelora) is None


@torch.no_grad()
@pytest.mark.parametrize("name", CAUSAL)
def test_the_backbone_alone_gives_what_it_gives_inside_of_the_model(name):
    model = causal(name, router_scope="layer")
    inside = model(tokens(), output_hidden_states=True).hidden_states[-1]
    alone = model.base_model(tokens()).last_hidden_state
    torch.testing.assert_close(alone, inside)
    with model.use_experts("expert_1"):
        forced = model.base_model(tokens()).last_hidden_state
    assert not torch.equal(forced, alone)


def test_an_error_and_an_interrupt_leave_nothing_behind():
    model = causal(routing_level="sequence", router_scope="layer")
    expected = model.base_model(tokens()).last_hidden_state
    for kind in (ValueError, KeyboardInterrupt):

        def fail(*_, kind=kind):
            raise kind

        handle = model.model.norm.register_forward_pre_hook(fail)
        with pytest.raises(kind):
            model.base_model(tokens(seed=9))
        handle.remove()
        assert torch.equal(model.base_model(tokens()).last_hidden_state, expected)
        assert running_pass(model.moelora) is None


def test_several_micro_batches_with_a_loss_from_outside_raise_and_a_scale_helps():
    model = causal(**LOSSES).train()
    lean_forward(model)
    model(**batch(), lean=True).backward()
    with pytest.raises(RuntimeError, match="MoeLoraCallback"):
        model(**batch(), lean=True).backward()
    for set_to_none in (True, False):
        for _ in range(2):
            optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), 0.1)
            optimizer.zero_grad(set_to_none=set_to_none)
            model(**batch(), lean=True).backward()
            optimizer.step()
    model.moelora.loss_scale = 0.5
    for _ in range(2):
        model(**batch(), lean=True).backward()


def test_unload_takes_the_hooks_and_the_clients_forward_out():
    base = causal_base()
    plain = base(tokens()).logits
    base.config.name_or_path = "someone/tiny"
    model = into(base)
    assert model.config.name_or_path == "" and model.name_or_path == ""
    lean_forward(model)
    unloaded = model.unload()
    assert torch.equal(unloaded(tokens()).logits, plain)
    assert unloaded.config.name_or_path == "someone/tiny"
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in unloaded.modules())


def test_a_lora_on_top_names_the_mixture(tmp_path):
    model = causal()
    model.save_pretrained(tmp_path / "mixture", save_base=True)
    loaded = MoeLoraForCausalLM.from_pretrained(tmp_path / "mixture")
    config = peft.LoraConfig(
        target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM"
    )
    on_top = peft.get_peft_model(loaded, config).eval()
    on_top.save_pretrained(tmp_path / "lora")
    saved = peft.LoraConfig.from_pretrained(tmp_path / "lora")
    assert saved.base_model_name_or_path == str(tmp_path / "mixture")
    again = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "lora").eval()
    with torch.no_grad():
        torch.testing.assert_close(again(tokens()).logits, on_top(tokens()).logits)
    # And a mixture that has no folder does not pass for its base.
    fresh = peft.get_peft_model(causal(), peft.LoraConfig(target_modules=["q_proj"]))
    assert not fresh.peft_config["default"].base_model_name_or_path


def test_an_adapter_beside_the_experts_is_refused_when_the_model_is_saved(tmp_path):
    model = causal()
    model.add_adapter(peft.LoraConfig(target_modules=["q_proj"]), "beside")
    with pytest.raises(ValueError, match="delete_adapter"):
        model.save_pretrained(tmp_path / "mixture")
    assert not (tmp_path / "mixture").exists()
