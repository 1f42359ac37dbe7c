"""A checkpoint onto a base that its user loaded, quantised so that Python cannot copy it."""

from __future__ import annotations

from bases import causal_base
from checkpoint.stored import mixture_on, same, write_base
from transformers import AutoConfig, AutoModelForCausalLM, QuantoConfig

from moelora import MoeLoraForCausalLM


def test_both_ways_that_the_readme_names_take_a_quanto_base(tmp_path):
    write_base(tmp_path / "base")
    mixture_on(causal_base()).save_pretrained(tmp_path / "mixture")

    def quantised():
        how = QuantoConfig(weights="int8")
        return AutoModelForCausalLM.from_pretrained(tmp_path / "base", quantization_config=how)

    model = MoeLoraForCausalLM.from_pretrained(tmp_path / "mixture", base=quantised())
    # Without it the Auto class would begin with a deep copy of its keywords.
    config = AutoConfig.from_pretrained(tmp_path / "mixture")
    folder = tmp_path / "mixture"
    again = AutoModelForCausalLM.from_pretrained(folder, config=config, base=quantised())
    assert type(again.model.layers[0].mlp.up_proj).__name__ == "QLinear" and same(again, model)
