"""What transformers expects of any model class, beyond what its own suite asks."""

from __future__ import annotations

import pytest
import torch
from bases import causal_base, classifier_base
from core.mixtures import LEVELS, causal, tokens
from transformers import LlamaForCausalLM

from moelora import MoeLoraConfig, MoeLoraForCausalLM, MoeLoraForSequenceClassification
from moelora.core.model import base_class

SMALL = MoeLoraConfig(num_experts=2, r=2)


def test_rows_of_several_sequences_are_refused_at_sequence_level() -> None:
    """Continuous batching and flattened batches mark them so, and also mark single new tokens."""
    model = causal(routing_level="sequence")
    lengths = torch.tensor([0, 4, 10], dtype=torch.int32)
    positions = torch.cat([torch.arange(4), torch.arange(6)])[None]
    with pytest.raises(ValueError, match="routing_level='token'"):
        model(tokens(batch=1), position_ids=positions, cu_seq_lens_q=lengths, cu_seq_lens_k=lengths)
    # A step of `generate_batch`: one new token, and a cache under another name than in generate().
    lengths = torch.tensor([0, 1], dtype=torch.int32)
    with pytest.raises(ValueError, match="expert_routing|routing_level='token'"):
        model(tokens(batch=1, length=1), cu_seq_lens_q=lengths, cu_seq_lens_k=lengths)


@pytest.mark.parametrize("level", LEVELS)
def test_early_exit_assistant_gives_greedy_tokens(level: str) -> None:
    model = causal(routing_level=level)
    prompt = tokens(batch=1)
    settings = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    expected = model.generate(prompt, **settings)
    assert torch.equal(model.generate(prompt, assistant_early_exit=1, **settings), expected)
    assert model.config.num_hidden_layers == 2


def test_weights_made_on_meta_can_be_initialised() -> None:
    """`init_weights()` after `to_empty()` leaves no uninitialised memory."""
    config = causal_base().config
    with torch.device("meta"):
        model = MoeLoraForCausalLM.from_base(LlamaForCausalLM(config), SMALL)
    model.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.fill_(7)
    model.init_weights()
    left = [name for name, tensor in model.state_dict().items() if bool((tensor == 7).all())]
    assert left == []


def test_a_classifier_does_not_pretend_to_generate() -> None:
    """transformers warns of classes that have a method of generation and cannot generate."""
    model = MoeLoraForSequenceClassification.from_base(classifier_base(), SMALL)
    assert not model.can_generate()
    assert not hasattr(model, "prepare_inputs_for_generation")


@pytest.mark.parametrize("folder", [None, 5])
def test_from_pretrained_names_a_folder_of_the_wrong_type(folder: object) -> None:
    with pytest.raises(TypeError, match="NoneType|int") as error:
        MoeLoraForCausalLM.from_pretrained(folder)
    assert "save_pretrained" in str(error.value) or "folder" in str(error.value)


@pytest.mark.parametrize("name", ["bloom", "mixtral"])
def test_what_can_be_exchanged_is_what_the_base_can(name: str) -> None:
    """transformers reads it in the source of the module that a class says it is of."""
    ours = type(causal(name))
    base = base_class(ours)
    for question in ("_can_set_attn_implementation", "_can_set_experts_implementation"):
        # Ours first: an answer of the base would be inherited.
        assert getattr(ours, question)() == getattr(base, question)()
