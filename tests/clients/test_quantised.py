"""Bases that bitsandbytes, torchao or quanto quantised, on a CPU: what a mixture on them computes,
trains, saves and gives back.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from bases import VOCAB, causal_base
from bitsandbytes.functional import has_avx512bf16
from core.mixtures import NO_ROUTER_LOSS, own_parameters
from optimum.quanto import QTensor, freeze, qint8, quantize
from peft.utils.integrations import dequantize_module_weight
from torchao.quantization import Int8WeightOnlyConfig, quantize_
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    QuantoConfig,
    TorchAoConfig,
    Trainer,
    TrainingArguments,
)

from moelora import MoeLoraConfig, MoeLoraForCausalLM
from moelora.checkpoint.state import tensors_to_save

FOUR_BITS = {
    "bitsandbytes 4-bit": lambda: BitsAndBytesConfig(load_in_4bit=True),
    "bitsandbytes 4-bit, nested, stored as bf16": lambda: BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_quant_storage=torch.bfloat16,
    ),
}
KINDS = FOUR_BITS | {
    "bitsandbytes 8-bit": lambda: BitsAndBytesConfig(load_in_8bit=True),
    "torchao int8": lambda: TorchAoConfig(Int8WeightOnlyConfig()),
    "quanto int8": lambda: QuantoConfig(weights="int8"),
}
ALL = dict(num_experts=3, r=4, target_modules="all-linear")
# Of fp32, where the weights are dequantised inside the product or before it.
TOLERANCE = 1e-5
PACKS = pytest.mark.skipif(not has_avx512bf16(), reason="needs a CPU with AVX512-BF16")
RELOAD = """
import sys, torch, transformers, moelora
from pathlib import Path
transformers.logging.set_verbosity_error()
torch.set_num_threads(1)
for folder in sys.argv[1:]:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        logits = model(torch.load(Path(folder, "ids.pt"))).logits
    torch.save(logits, Path(folder, "again.pt"))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A base of two blocks of scales a row."""
    path = tmp_path_factory.mktemp("base")
    causal_base(hidden_size=128, intermediate_size=192).save_pretrained(path)
    return path


def some_ids() -> torch.Tensor:
    return torch.randint(3, VOCAB, (8, 9), generator=torch.Generator().manual_seed(0))


def loaded(folder: Path, kind: str) -> Any:
    """The bare base, quantised."""
    how = KINDS[kind]()
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=how).eval()


def mixture_on(folder: Path, kind: str, **fields: Any) -> Any:
    """A mixture on it whose experts do something."""
    config = MoeLoraConfig(**ALL | fields)
    how = KINDS[kind]()
    model = MoeLoraForCausalLM.from_base(folder, config, quantization_config=how)
    return with_experts(model)


@torch.no_grad()
def with_experts(model: Any) -> Any:
    draw = torch.Generator().manual_seed(1)
    for name, parameter in own_parameters(model).items():
        if "lora_B" in name:
            parameter.normal_(std=0.05, generator=draw)
    return model.eval()


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(some_ids()).logits


def gradients(model: Any) -> dict[str, torch.Tensor]:
    """Those of the experts and routers, in training mode."""
    model.train()
    model.zero_grad()
    model(some_ids(), labels=some_ids()).loss.backward()
    model.eval()
    return {name: p.grad.clone() for name, p in own_parameters(model).items()}


@torch.no_grad()
def dequantised(quantised: Any, plain: Any) -> Any:
    """`plain` with the weights that the linears of `quantised` stand for."""
    for name, module in plain.named_modules():
        if isinstance(module, torch.nn.Linear):
            linear = quantised.get_submodule(name)
            weight = linear.weight
            is_quanto = isinstance(weight, QTensor)
            whole = weight.dequantize() if is_quanto else dequantize_module_weight(linear)
            module.weight.copy_(whole)
    return plain


@pytest.fixture(scope="module")
def trained(folder, tmp_path_factory) -> dict[str, tuple[Path, torch.Tensor]]:
    """A mixture of each kind that the stock Trainer trained and evaluated by turns, with gradient
    checkpointing: its folder and its logits; another process has loaded them all.
    """
    runs = {}
    for kind in KINDS:
        model = MoeLoraForCausalLM.from_base(
            folder, MoeLoraConfig(**ALL), quantization_config=KINDS[kind]()
        )
        before = {name: p.detach().clone() for name, p in own_parameters(model).items()}
        rows = [{"input_ids": row, "labels": row} for row in some_ids()]
        output = tmp_path_factory.mktemp("trained")
        arguments = TrainingArguments(
            str(output),
            max_steps=2,
            learning_rate=1e-2,
            gradient_checkpointing=True,
            eval_strategy="steps",
            eval_steps=1,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
        )
        trainer = Trainer(model=model, args=arguments, train_dataset=rows, eval_dataset=rows)
        trainer.train()
        losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
        assert losses == sorted(losses, reverse=True) and len(losses) == 2
        assert all(not torch.equal(p, before[name]) for name, p in own_parameters(model).items())
        model.eval()
        expected = logits(model)
        prompt = some_ids()[:, :5]
        written = [
            model.generate(prompt, max_new_tokens=4, do_sample=False, use_cache=cached)
            for cached in (True, False)
        ]
        assert torch.equal(*written)
        trainer.save_model(str(output))
        assert torch.equal(logits(model), expected)
        torch.save(some_ids(), output / "ids.pt")
        runs[kind] = output, expected
    folders = [str(output) for output, _ in runs.values()]
    subprocess.run([sys.executable, "-c", RELOAD, *folders], check=True, timeout=300)
    return runs


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_trainer_trained_is_the_same_in_another_process(kind, trained, folder):
    output, expected = trained[kind]
    assert torch.equal(torch.load(output / "again.pt"), expected)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(output)), expected)
    how = {"quantization_config": KINDS[kind]()}
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(output, **how)), expected)
    onto = MoeLoraForCausalLM.from_pretrained(output, base=loaded(folder, kind))
    assert torch.equal(logits(onto), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_logits_and_gradients_are_those_of_the_dequantised_weights(kind, folder):
    base = loaded(folder, kind)
    plain = dequantised(base, AutoModelForCausalLM.from_pretrained(folder))
    # The balancing loss would follow the step before.
    config = MoeLoraConfig(**ALL | NO_ROUTER_LOSS)
    model = with_experts(MoeLoraForCausalLM.from_base(base, config))
    reference = with_experts(MoeLoraForCausalLM.from_base(plain, config))
    reference.load_state_dict(tensors_to_save(model))
    expected = gradients(reference)
    torch.testing.assert_close(
        logits(model.train()), logits(reference.train()), atol=TOLERANCE, rtol=1e-3
    )
    if kind != "bitsandbytes 8-bit":
        # Which in evaluation also rounds what is multiplied.
        torch.testing.assert_close(
            logits(model.eval()), logits(reference.eval()), atol=TOLERANCE, rtol=1e-3
        )
    logits(model.eval())
    # Evaluation has left the weights as they were.
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, expected[name], atol=TOLERANCE, rtol=1e-3, msg=name)


@pytest.mark.parametrize("kind", KINDS)
def test_a_new_mixture_is_the_base_and_gives_it_back(kind, folder):
    with torch.no_grad():
        # In training mode, for 4 bits on some CPUs: see the last tests here.
        own = loaded(folder, kind).train()(some_ids()).logits
    evaluated = logits(loaded(folder, kind))
    base = loaded(folder, kind)
    state = [vars(module).copy() for module in base.modules()]
    model = MoeLoraForCausalLM.from_base(base, MoeLoraConfig(**ALL)).train()
    with torch.no_grad():
        assert torch.equal(model(some_ids()).logits, own)
    if kind not in FOUR_BITS:
        assert torch.equal(logits(model.eval()), evaluated)
    again = with_experts(model).unload()
    assert again is base and type(base).__name__ == "LlamaForCausalLM"
    for module, before in zip(base.modules(), state, strict=True):
        switches = {k: v for k, v in before.items() if isinstance(v, (bool, int, float, str))}
        assert {k: vars(module)[k] for k in switches} == switches | {"training": False}
    assert torch.equal(logits(base), evaluated)


@pytest.mark.parametrize("kind", KINDS)
def test_experts_of_a_plain_base_go_onto_a_quantised_one_and_back(kind, folder, tmp_path):
    config = MoeLoraConfig(**ALL)
    plain = with_experts(MoeLoraForCausalLM.from_base(folder, config))
    plain.save_pretrained(tmp_path / "plain")
    how = {"quantization_config": KINDS[kind]()}
    onto = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", **how)
    model = mixture_on(folder, kind)
    model.load_state_dict(tensors_to_save(plain))
    assert torch.equal(logits(onto), logits(model))
    assert not torch.equal(logits(onto), logits(plain))
    onto.save_pretrained(tmp_path / "quantised")
    base = AutoModelForCausalLM.from_pretrained(folder)
    back = MoeLoraForCausalLM.from_pretrained(tmp_path / "quantised", base=base)
    assert torch.equal(logits(back), logits(plain))


@pytest.mark.parametrize("kind", KINDS)
def test_another_base_is_told_by_its_scales(kind, folder, tmp_path):
    mixture_on(folder, kind).save_pretrained(tmp_path / "experts")
    other = causal_base(hidden_size=128, intermediate_size=192)
    with torch.no_grad():
        for layer in other.model.layers:
            for linear in (layer.self_attn.q_proj, layer.mlp.down_proj):
                linear.weight *= 1.2
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="q_proj.weight has other values"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "experts", base=str(tmp_path / "other"))
    # The right one, quantised in another way: embeddings, norms and head are compared.
    for another in KINDS:
        MoeLoraForCausalLM.from_pretrained(tmp_path / "experts", base=loaded(folder, another))


@pytest.mark.parametrize("kind", KINDS)
def test_experts_come_from_peft_go_to_peft_and_are_not_merged_into_codes(kind, folder, tmp_path):
    model = mixture_on(folder, kind)
    model.add_expert("copied", copy_of="expert_0")
    model.remove_expert("expert_1")
    for name in ("expert_0", "expert_2"):
        model.export_expert(name, tmp_path / name)
    with pytest.raises(ValueError, match="quantised.*export_merged"):
        model.merge_and_unload({"expert_0": 1.0})
    report = model.export_merged({"expert_0": 0.5, "expert_2": 0.5}, tmp_path / "merged")
    assert report.error < 1e-6
    adapters = {name: tmp_path / name for name in ("expert_0", "expert_2")}
    how = {"quantization_config": KINDS[kind]()}
    composed = MoeLoraForCausalLM.from_adapters(folder, adapters, **how).train()
    # In training mode: see the last tests here.
    single = peft.PeftModel.from_pretrained(loaded(folder, kind), tmp_path / "expert_2").train()
    with torch.no_grad(), composed.use_experts("expert_2"):
        torch.testing.assert_close(
            composed(some_ids()).logits, single(some_ids()).logits, atol=TOLERANCE, rtol=1e-4
        )
    with model.use_experts("expert_2"), composed.eval().use_experts("expert_2"):
        torch.testing.assert_close(logits(composed), logits(model), atol=TOLERANCE, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_a_base_is_saved_along_quantised_or_not_at_all(kind, folder, tmp_path):
    model = mixture_on(folder, kind)
    if kind == "quanto int8":
        with pytest.raises(ValueError, match="not serializable"):
            model.save_pretrained(tmp_path / "whole", save_base=True)
        assert not (tmp_path / "whole" / "model.safetensors").exists()
        return
    expected = logits(model)
    model.save_pretrained(tmp_path / "whole", save_base=True)
    assert torch.equal(logits(model), expected)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "whole")
    assert again.hf_quantizer.pre_quantized
    assert torch.equal(logits(again), expected)
    again.save_pretrained(tmp_path / "experts")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "experts")), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_experts_begin_along_the_spectrum_of_what_the_codes_stand_for(kind, folder):
    base = loaded(folder, kind)
    plain = dequantised(base, AutoModelForCausalLM.from_pretrained(folder))
    config = MoeLoraConfig(**ALL, expert_init="svd")
    found = MoeLoraForCausalLM.from_base(base, config).moelora.expert(0)
    expected = MoeLoraForCausalLM.from_base(plain, config).moelora.expert(0)
    for linear, factors in found.items():
        # Neighbours in the spectrum may mix: the space is compared.
        same = factors.A @ expected[linear].A.T * 3
        torch.testing.assert_close(same @ same.T, torch.eye(4), atol=0.05, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_codes_are_not_trained(kind, folder):
    base = loaded(folder, kind)
    with pytest.raises(ValueError, match="down_proj|quantised, and codes cannot be trained"):
        MoeLoraForCausalLM.from_base(base, MoeLoraConfig(**ALL, modules_to_save=["down_proj"]))
    assert type(base).__name__ == "LlamaForCausalLM" and not hasattr(base, "moelora")
    trains_head = MoeLoraConfig(num_experts=2, modules_to_save=["lm_head"])
    assert MoeLoraForCausalLM.from_base(base, trains_head).lm_head.weight.requires_grad


def test_bases_that_were_quantised_in_memory(folder):
    for quantise in (
        lambda base: (quantize(base, weights=qint8), freeze(base)),
        lambda base: quantize_(base, Int8WeightOnlyConfig()),
    ):
        base = AutoModelForCausalLM.from_pretrained(folder).eval()
        quantise(base)
        expected = logits(base)
        model = MoeLoraForCausalLM.from_base(base, MoeLoraConfig(**ALL)).eval()
        assert torch.equal(logits(model), expected)
        assert all(g.any() for n, g in gradients(with_experts(model)).items() if "lora" in n)


# Why a mixture keeps 4-bit linears from packing their weights (bitsandbytes 0.50): on a CPU with
# AVX512-BF16 the first forward in eval mode packs them, for products in 16 bits.


@PACKS
@pytest.mark.parametrize("kind", FOUR_BITS)
def test_in_eval_mode_the_bare_base_is_another_by_sixteen_bits(kind, folder):
    base = loaded(folder, kind)
    with torch.no_grad():
        own = base.train()(some_ids()).logits
    packed = logits(base.eval())
    model = MoeLoraForCausalLM.from_base(loaded(folder, kind), MoeLoraConfig(**ALL)).eval()
    assert torch.equal(logits(model), own)
    off = float((packed - own).abs().max())
    assert 1e-4 < off < 1e-2


@PACKS
def test_a_packed_weight_has_no_gradient_and_is_not_unpacked_as_it_was(folder):
    base = loaded(folder, "bitsandbytes 4-bit")
    linear = base.model.layers[0].mlp.gate_proj
    expected = linear.train()(torch.eye(128))
    linear.eval()(torch.eye(128))
    x = torch.eye(128, requires_grad=True)
    with pytest.warns(UserWarning, match="gemv_4bit"):
        linear.train()(x).sum().backward()
    assert x.grad is None
    linear.state_dict()
    assert float((linear(torch.eye(128)) - expected).detach().abs().max()) > 1e-2


@PACKS
@pytest.mark.parametrize("kind", FOUR_BITS)
def test_a_base_that_is_packed_already_is_refused(kind, folder):
    base = loaded(folder, kind)
    logits(base)
    with pytest.raises(ValueError, match=r"q_proj is packed.*Load the base again"):
        MoeLoraForCausalLM.from_base(base, MoeLoraConfig(**ALL))
    assert type(base).__name__ == "LlamaForCausalLM"
    assert all(getattr(m, "support_avx512bf16_for_cpu", True) for m in base.modules())
