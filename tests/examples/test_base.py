"""The demo's base model: tied, whole, and sane on plain English."""

import pytest
import torch
from smollm2 import load_smollm2

ENGLISH = (
    "The sun rises in the east and sets in the west. Water is made of hydrogen and oxygen, and it "
    "covers most of the surface of the Earth. In the morning, people drink coffee or tea."
)


def test_the_base_reads_english():
    model, tokenizer = load_smollm2()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.dtype == torch.float32
    ids = tokenizer(ENGLISH, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        # Measured 2.5 to 2.6; a wrongly converted model gives about log(49152) = 10.8.
        assert model(ids, labels=ids).loss < 3.5


def test_num_layers_cuts_the_decoder():
    model, _ = load_smollm2(num_layers=2)
    assert len(model.model.layers) == model.config.num_hidden_layers == 2
    assert model(torch.tensor([[1, 2, 3]])).logits.shape == (1, 3, 49152)
    with pytest.raises(ValueError, match="expected 1 to 30"):
        load_smollm2(num_layers=31)
