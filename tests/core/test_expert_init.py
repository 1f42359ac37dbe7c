"""expert_init: A begins orthogonal, or as segments of the frozen weight's spectrum, and the mixture
as the base.
"""

from __future__ import annotations

import copy

import accelerate
import pytest
import torch
from bases import causal_base
from core.mixtures import expert_parameters, own_parameters, tokens
from torch import nn
from transformers import AutoModelForCausalLM, QuantoConfig
from transformers.pytorch_utils import Conv1D

from moelora import MoeLoraConfig, MoeLoraForCausalLM
from moelora.core.expert_init import right_singular_vectors
from moelora.core.model import base_class

INITS = ("orthogonal", "svd")
ALL = {"num_experts": 4, "r": 2, "target_modules": "all-linear"}


def made(init, base=None, **fields):
    """A new mixture, its base by default the tiny LLaMA."""
    torch.manual_seed(0)
    config = MoeLoraConfig(**{**ALL, "expert_init": init, **fields})
    return MoeLoraForCausalLM.from_base(causal_base() if base is None else base, config).eval()


def rows(model, linear):
    """All experts' rows of A in one linear."""
    own = [model.moelora.expert(e)[linear].A for e in range(model.moelora.num_experts)]
    return torch.cat(own[:1] if model.moelora_config.share_lora_A else own)


def weight_of(module):
    """W `[d_out, d_in]` of a linear or a Conv1D, in float64."""
    weight = module.weight.detach().double()
    return weight.T if isinstance(module, Conv1D) else weight


def assert_inside(A, vectors):
    """The rows of A lie in what the orthonormal rows of `vectors` span."""
    A = A.double()
    torch.testing.assert_close(A @ vectors.T @ vectors, A, rtol=0, atol=1e-4)


@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize("base", ["llama", "gpt2"])
@pytest.mark.parametrize("init", INITS)
def test_rows_are_orthogonal_of_the_usual_length_and_the_mixture_is_its_base(init, base, share):
    model = made(init, causal_base(base), share_lora_A=share)
    assert torch.equal(model(tokens()).logits, causal_base(base)(tokens()).logits)
    usual = made("kaiming", causal_base(base))
    for linear in model.moelora.linears():
        A = rows(model, linear)
        expected = torch.eye(len(A)) / 3
        torch.testing.assert_close(A @ A.T, expected, rtol=0, atol=1e-5)
        assert abs(float(rows(usual, linear).square().sum(1).mean()) - 1 / 3) < 0.15
    twin = made(init, causal_base(base), share_lora_A=share)
    again = own_parameters(twin)
    assert all(torch.equal(p, again[n]) for n, p in own_parameters(model).items())
    # Linears that read one tensor have slices of their own.
    several = [s for s in model.moelora.sites.values() if len(s.names) > 1]
    assert not any(
        torch.equal(rows(model, s.names[0]), rows(model, n)) for s in several for n in s.names[1:]
    )


@pytest.mark.parametrize("base", ["llama", "gpt2"])
def test_experts_are_segments_of_the_spectrum(base):
    model = made("svd", causal_base(base))
    for linear in model.moelora.linears():
        Vh = torch.linalg.svd(weight_of(model.get_submodule(linear)), full_matrices=False).Vh
        gap = len(Vh) // 4
        for expert in range(4):
            first = 2 * expert + expert * (len(Vh) - 8) // 4
            assert first == expert * gap
            assert_inside(model.moelora.expert(expert)[linear].A, Vh[first : first + 2])


def test_experts_of_other_ranks_and_more_rows_than_singular_values():
    linear = "model.layers.0.self_attn.k_proj"  # 16 outputs, 32 inputs
    model = made("svd", r=[2, 8, 1, 3], expert_ranks={linear: [0, 8, 8, 8]})
    W = weight_of(model.get_submodule(linear))
    Vh = torch.linalg.svd(W).Vh
    # Of 32 directions 8 are left over: experts begin 2 further apart than they have rows.
    assert_inside(model.moelora.expert(1)[linear].A, Vh[2:10])
    assert_inside(model.moelora.expert(2)[linear].A[:4], Vh[12:16])
    unread = torch.cat([model.moelora.expert(2)[linear].A[4:], model.moelora.expert(3)[linear].A])
    assert float((unread.double() @ W.T).abs().max()) < 1e-6
    A = rows(model, linear)
    torch.testing.assert_close(A @ A.T, torch.eye(24) / 3, rtol=0, atol=1e-5)


@pytest.mark.parametrize("init", INITS)
def test_more_rows_than_inputs_are_refused_and_the_base_is_as_it_was(init):
    base = causal_base()
    before = base(tokens()).logits
    with pytest.raises(ValueError, match=f"{init}.*36 rows together.*d_in=32.*'kaiming'"):
        made(init, base, r=9)
    assert torch.equal(base(tokens()).logits, before) and not hasattr(base, "moelora")
    assert made(init, r=8).moelora.num_experts == 4


@pytest.mark.parametrize("shape", [(12, 5), (5, 12), (7, 7), (1, 6)])
@pytest.mark.parametrize("whole", [False, True])
def test_the_right_singular_vectors(shape, whole):
    W = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    V = right_singular_vectors(W, whole)
    expected = torch.linalg.svd(W, full_matrices=whole).Vh
    n = min(shape)
    cosines = (V[:n] * expected[:n]).sum(1).abs()
    torch.testing.assert_close(cosines, torch.ones(n, dtype=torch.float64))
    torch.testing.assert_close(V @ V.T, torch.eye(len(expected), dtype=torch.float64))
    assert (V.gather(1, V.abs().argmax(1, keepdim=True)) > 0).all()
    half = right_singular_vectors(W.bfloat16(), whole)
    assert half.dtype == torch.float32 and half.shape == V.shape
    flat = right_singular_vectors(torch.zeros(shape), whole)
    torch.testing.assert_close(flat @ flat.T, torch.eye(len(flat)))


def test_a_base_in_16_bits_has_its_own_singular_vectors():
    base = causal_base().to(torch.bfloat16)
    model = made("svd", base)
    linear = "model.layers.1.mlp.gate_proj"
    Vh = torch.linalg.svd(weight_of(model.get_submodule(linear)), full_matrices=False).Vh
    assert_inside(model.moelora.expert(0)[linear].A, Vh[:2])
    assert rows(model, linear).dtype == torch.float32


def test_a_quantised_base_is_asked_what_its_weights_are(tmp_path):
    causal_base().save_pretrained(tmp_path)
    quantised = {"quantization_config": QuantoConfig(weights="int8")}
    config = MoeLoraConfig(**ALL, expert_init="svd")
    model = MoeLoraForCausalLM.from_base(tmp_path, config, **quantised).eval()
    plain = AutoModelForCausalLM.from_pretrained(tmp_path, **quantised)
    assert torch.equal(model(tokens()).logits, plain(tokens()).logits)
    for linear in model.moelora.linears():
        layer = plain.get_submodule(linear)
        assert type(layer).__name__ == "QLinear"
        W = layer.weight.dequantize().detach().double()
        Vh = torch.linalg.svd(W, full_matrices=False).Vh
        assert_inside(model.moelora.expert(0)[linear].A, Vh[:2])


class Opaque(nn.Linear):
    """A linear whose weight is integers that its forward does not take on this machine."""

    def __init__(self, linear):
        super().__init__(linear.in_features, linear.out_features, bias=False)
        codes = torch.zeros_like(linear.weight, dtype=torch.int8)
        self.weight = nn.Parameter(codes, requires_grad=False)

    def forward(self, x):
        if x.shape == (32, 32):
            raise RuntimeError("no kernel for these shapes")
        return x.new_zeros(*x.shape[:-1], self.out_features)


class Biased(Opaque):
    """With a large bias, and a forward that works."""

    def __init__(self, linear):
        super().__init__(linear)
        self.codes = nn.Parameter(linear.weight.detach().clone(), requires_grad=False)

    def forward(self, x):
        return nn.functional.linear(x, self.codes, self.codes.new_full((len(self.codes),), 3.0))


def test_a_large_bias_does_not_round_the_weight_off():
    base = causal_base().to(torch.bfloat16)
    mlp = base.model.layers[0].mlp
    mlp.up_proj = Biased(mlp.up_proj)
    A = made("svd", base).moelora.expert(0)["model.layers.0.mlp.up_proj"].A.double()
    Vh = torch.linalg.svd(mlp.up_proj.codes.double(), full_matrices=False).Vh[:2]
    assert float((A @ Vh.T).square().sum()) > 0.99 * 2 / 3


def test_a_weight_that_nobody_shows_is_refused_with_the_remedy():
    base = causal_base()
    mlp = base.model.layers[0].mlp
    mlp.up_proj = Opaque(mlp.up_proj)
    with pytest.raises(ValueError, match=r"up_proj, and this Opaque.*no kernel.*'orthogonal'"):
        made("svd", base)
    assert made("orthogonal", base).moelora.num_experts == 4


class Bent(Opaque):
    """Integers again, and a bend behind the product: no matrix says what it does."""

    def forward(self, x):
        return (x.cumsum(-1) ** 2)[..., : self.out_features]


def test_what_is_not_linear_has_no_singular_vectors():
    base = causal_base()
    layer = base.model.layers[0].self_attn
    layer.q_proj = Bent(layer.q_proj)
    with pytest.raises(ValueError, match=r"q_proj, and this Bent.*not linear.*'orthogonal'"):
        made("svd", base)


def test_an_offloaded_base_and_one_without_values_yet():
    expected = expert_parameters(made("svd"))
    offloaded = causal_base()
    accelerate.cpu_offload(offloaded, execution_device=torch.device("cpu"))
    found = expert_parameters(made("svd", offloaded))
    for name, parameter in expected.items():
        torch.testing.assert_close(found[name], parameter, rtol=1e-4, atol=1e-5)
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(causal_base().config)
    model = made("svd", empty)
    assert not model.moelora.has_values
    model.to_empty(device="cpu")
    base_class(type(model)).load_state_dict(model, causal_base().state_dict(), strict=False)
    # What `from_pretrained` marks: these are not to be drawn.
    for parameter in model.parameters():
        parameter._is_hf_initialized = True
    model.init_weights()
    for linear in model.moelora.linears():
        Vh = torch.linalg.svd(weight_of(model.get_submodule(linear)), full_matrices=False).Vh
        assert_inside(model.moelora.expert(0)[linear].A, Vh[:2])


def test_what_is_loaded_copied_or_added_is_not_begun_anew(tmp_path):
    model = made("svd")
    with torch.no_grad():
        for parameter in own_parameters(model).values():
            parameter.add_(0.01)
    expected = model(tokens()).logits
    assert torch.equal(copy.deepcopy(model)(tokens()).logits, expected)
    model.save_pretrained(tmp_path)
    again = MoeLoraForCausalLM.from_pretrained(str(tmp_path), base=causal_base())
    assert again.moelora_config.expert_init == "svd"
    assert torch.equal(again(tokens()).logits, expected)
    model.export_expert("expert_0", tmp_path / "adapter")
    config = MoeLoraConfig(num_experts=1, num_experts_per_tok=1, expert_init="svd")
    with pytest.raises(ValueError, match=r"expert_init='svd'.*come from the adapters"):
        MoeLoraForCausalLM.from_adapters(causal_base(), {"a": tmp_path / "adapter"}, config)
