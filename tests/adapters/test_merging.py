"""Fixed mixtures out: recipes against examples by hand, one LoRA of several experts, and the plain
base.
"""

from __future__ import annotations

import copy
import math

import pytest
import torch
from adapters.peft_folders import base_of
from bases import causal_base
from core.mixtures import causal, classifier, into, tokens
from peft import PeftModel

from moelora.adapters.merging import (
    RECIPES,
    compress,
    distance,
    expert_deltas,
    merged_deltas,
    product,
)
from moelora.core.experts import LoraFactors

INPUT = tokens(3, 9)
WEIGHTS = {"expert_0": 0.7, "expert_2": -0.4, "expert_3": 1.3}
FIRST, LAST = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"
MIXED = {
    "expert_ranks": {FIRST: [2, 0, 5, 3], LAST: [0, 7, 0, 0]},
    "expert_scaling": {FIRST: [0.5, 1.0, 3.0, 0.1], LAST: [-1.5, 0.7, 2.0, 1.9]},
}
DENSE = {
    "ties": {"density": 0.5},
    "dare_linear": {"density": 0.5, "seed": 3},
    "dare_ties": {"density": 0.5, "seed": 3},
    "breadcrumbs": {"density": 0.5, "gamma": 0.1},
}


def model_of(name: str, **fields):
    """An active mixture in the tiny base `name`, a classifier for BERT."""
    return classifier(name, **fields) if name == "bert" else causal(name, **fields)


def logits(model):
    """Logits of `INPUT` in eval mode, without a gradient."""
    with torch.no_grad():
        return model.eval()(input_ids=INPUT).logits


def forced(model, experts):
    """Logits with these experts alone."""
    with model.use_experts(experts):
        return logits(model)


def close(found, expected, tolerance=1e-5):
    """Equal within `tolerance` of the largest value."""
    assert (found - expected).abs().max() <= tolerance * expected.abs().max()


def summed(model, weights):
    """Σ w·s·B·A `[d_out, d_in]` in float64 by the linear's name."""
    sums: dict[str, torch.Tensor] = {}
    for expert, weight in weights.items():
        for name, d in expert_deltas(model, expert).items():
            sums[name] = sums.get(name, 0) + weight * d.scaling * d.B.T.double() @ d.A.double()
    return sums


def stock_deltas(folder, name="llama"):
    """What stock PEFT adds to each linear, in float64."""
    made = PeftModel.from_pretrained(base_of(name), str(folder))
    found = {}
    for key, module in made.named_modules():
        if hasattr(module, "lora_A"):
            A, B = (
                module.lora_A["default"].weight.double(),
                module.lora_B["default"].weight.double(),
            )
            found[key.removeprefix("base_model.model.")] = (
                module.scaling["default"] * B @ A
            ).detach()
    return found


def as_delta(rows):
    """A ΔW given by its values, as a product with the identity."""
    matrix = torch.tensor(rows)
    return LoraFactors(matrix / 2, torch.eye(len(rows)), 2.0)


ONE, TWO = as_delta([[4.0, -1.0, 0.5, 3.0]]), as_delta([[-2.0, -3.0, 0.25, 1.0]])


def test_ties_by_hand():
    """Trimmed to two values each: [4, 0, 0, 3] and [-2, -3, 0, 0]; signs of sums [+, -, ., +]."""
    merged = RECIPES["ties"]([ONE, TWO], [1.0, 0.5], density=0.5)
    assert torch.equal(merged, torch.tensor([[4.0, -1.5, 0.0, 3.0]]))
    # Nothing trimmed: signs [+, -, +, +], and where both agree the mean of the weighted values.
    merged = RECIPES["ties"]([ONE, TWO], [1.0, 0.5], density=1.0)
    assert torch.equal(
        merged, torch.tensor([[4.0, (-1 - 1.5) / 2, (0.5 + 0.125) / 2, (3 + 0.5) / 2]])
    )


def test_breadcrumbs_by_hand():
    """A quarter of the largest goes and half stays: [., -1, ., 3] and [-2, ., ., 1]."""
    merged = RECIPES["breadcrumbs"]([ONE, TWO], [1.0, 0.5], density=0.5, gamma=0.25)
    assert torch.equal(merged, torch.tensor([[-1.0, -1.0, 0.0, 3.5]]))


def test_dare_keeps_a_share_rescales_it_and_draws_by_its_seed():
    big = LoraFactors(torch.ones(1, 200), torch.ones(1, 50), 1.0)
    state = torch.get_rng_state()
    merged = RECIPES["dare_linear"]([big], [0.5], density=0.25, seed=7)
    assert torch.equal(torch.get_rng_state(), state)
    assert set(merged.unique().tolist()) == {0.0, 0.5 / 0.25}
    assert abs((merged != 0).double().mean() - 0.25) < 0.02
    assert torch.equal(merged, RECIPES["dare_linear"]([big], [0.5], density=0.25, seed=7))
    assert not torch.equal(merged, RECIPES["dare_linear"]([big], [0.5], density=0.25, seed=8))


def test_every_linear_draws_for_itself():
    model = causal("llama")
    options = {"density": 0.5, "seed": 3}
    merged = dict(merged_deltas(model, {"expert_0": 1.0}, "dare_linear", options))
    first, second = (merged[f"model.layers.{i}.self_attn.q_proj"] != 0 for i in (0, 1))
    assert first.shape == second.shape and not torch.equal(first, second)


def test_dare_ties_by_hand():
    """With nothing dropped it is TIES without trimming; with drops each value is 0 or TIES of
    rescaled ones.
    """
    whole = RECIPES["dare_ties"]([ONE, TWO], [1.0, 0.5], density=1.0, seed=0)
    assert torch.equal(whole, RECIPES["ties"]([ONE, TWO], [1.0, 0.5], density=1.0))
    alone = RECIPES["dare_ties"]([ONE], [1.0], density=0.5, seed=0)
    assert all(v in (0.0, 2 * w) for v, w in zip(alone[0].tolist(), product(ONE)[0].tolist()))


@pytest.mark.parametrize("recipe", ["linear", "concatenation", "svd"])
def test_the_exact_recipes_are_the_weighted_sum(recipe):
    options = {"rank": 2} if recipe == "svd" else {}
    merged = RECIPES[recipe]([ONE, TWO], [1.0, 0.5], **options)
    torch.testing.assert_close(product(merged).float(), torch.tensor([[3.0, -2.5, 0.625, 3.5]]))


def test_compressing_is_the_best_approximation_and_never_sees_the_product():
    generator = torch.Generator().manual_seed(0)
    # Wider and narrower than the rank of the sum, so that a reduced QR is not square.
    for d_out, d_in, rank in ((40, 30, 12), (8, 30, 12), (8, 6, 12)):
        A, B = (
            torch.randn(rank, n, generator=generator, dtype=torch.float64) for n in (d_in, d_out)
        )
        delta = LoraFactors(A, B, -0.5)
        whole = product(delta)
        values = torch.linalg.svdvals(whole)
        for r in (1, 3, 5):
            for given in (delta, whole):
                small = compress(given, r)
                off, norm = distance(given, small)
                assert len(small.A) == r
                assert off == pytest.approx(values[r:].norm().item(), rel=1e-9)
                assert norm == pytest.approx(values.norm().item(), rel=1e-12)
                assert (whole - product(small)).norm().item() == pytest.approx(off, rel=1e-9)
    huge = LoraFactors(torch.randn(4, 2_000_000), torch.randn(4, 2_000_000), 1.0)
    assert len(compress(huge, 2).A) == 2


@pytest.mark.parametrize(
    ("name", "fields"), [("llama", MIXED), ("gpt2", {}), ("opt", {}), ("bert", {})]
)
def test_a_concatenation_gives_the_mixtures_logits_in_peft(name, fields, tmp_path):
    model = model_of(name, **fields)
    report = model.export_merged(WEIGHTS, tmp_path / "out")
    expected = forced(model, WEIGHTS)
    close(logits(PeftModel.from_pretrained(base_of(name), str(tmp_path / "out"))), expected)
    assert (expected - logits(base_of(name))).abs().max() > 1e-3
    assert (
        report.error < 1e-7
        and set(report.errors) == set(report.ranks)
        and report.weights == WEIGHTS
    )
    if fields:
        assert report.ranks[FIRST] == 10 and LAST not in report.ranks
        assert str(report).startswith(
            "linear of 3 experts: ranks 9 to 10 in 13 linears, relative error "
        )


def test_experts_of_weight_zero_take_no_rank(tmp_path):
    model = causal("llama")
    report = model.export_merged({"expert_0": 1.0, "expert_1": 0.0}, tmp_path / "out")
    assert set(report.ranks.values()) == {3}
    model.export_merged({"expert_0": 0}, tmp_path / "none")
    assert not any(delta.any() for delta in stock_deltas(tmp_path / "none").values())


@pytest.mark.parametrize("recipe", ["linear", "svd"])
def test_svd_at_full_rank_is_exact_and_at_a_lower_one_the_best(recipe, tmp_path):
    model = causal("llama", **MIXED)
    exact = summed(model, WEIGHTS)
    full = model.export_merged(WEIGHTS, tmp_path / "full", rank=10, recipe=recipe)
    assert full.error < 1e-6
    low = model.export_merged(WEIGHTS, tmp_path / "low", rank=4, recipe=recipe)
    off = norm = 0.0
    for name, written in stock_deltas(tmp_path / "low").items():
        values = torch.linalg.svdvals(exact[name])
        best, found = values[4:].norm().item(), (exact[name] - written).norm().item()
        assert found == pytest.approx(best, rel=1e-5) and low.ranks[name] == 4
        assert low.errors[name] == pytest.approx(best / values.norm().item(), rel=1e-5)
        off, norm = off + best**2, norm + values.norm().item() ** 2
    assert low.error == pytest.approx(math.sqrt(off / norm), rel=1e-5) and low.recipe == recipe


def test_the_reported_error_holds_the_rounding_of_dtype(tmp_path):
    model = causal("llama")
    report = model.export_merged(WEIGHTS, tmp_path, dtype=torch.bfloat16)
    exact, written = summed(model, WEIGHTS), stock_deltas(tmp_path)
    for name, delta in written.items():
        error = ((exact[name] - delta).norm() / exact[name].norm()).item()
        assert 1e-4 < error < 1e-2 and report.errors[name] == pytest.approx(error, rel=1e-3)


@pytest.mark.parametrize("recipe", sorted(DENSE))
def test_other_recipes_are_approximated_with_their_error_and_merge_whole(recipe, tmp_path):
    model, options = causal("llama"), DENSE[recipe]
    report = model.export_merged(WEIGHTS, tmp_path / "out", recipe=recipe, rank=8, **options)
    again = model.export_merged(WEIGHTS, tmp_path / "again", recipe=recipe, rank=8, **options)
    assert again == report and 0 < report.error < 1
    whole = model.export_merged(WEIGHTS, tmp_path / "whole", recipe=recipe, rank=32, **options)
    assert whole.error < 1e-5
    expected = logits(PeftModel.from_pretrained(causal_base("llama"), str(tmp_path / "whole")))
    close(logits(model.merge_and_unload(WEIGHTS, recipe=recipe, **options)), expected, 1e-4)


@pytest.mark.parametrize(
    ("name", "fields"), [("llama", MIXED), ("gpt2", {}), ("opt", {}), ("bert", {})]
)
def test_merging_into_the_base_gives_the_mixtures_logits(name, fields):
    model = model_of(name, **fields)
    expected, state = forced(model, WEIGHTS), base_of(name).state_dict()
    plain = model.merge_and_unload(WEIGHTS)
    assert plain is model and type(plain) is type(base_of(name)) and not hasattr(plain, "moelora")
    assert plain.state_dict().keys() == state.keys()
    close(logits(plain), expected)


def test_merging_rounds_once():
    model = causal("llama").to(torch.bfloat16)
    before = model.get_submodule(FIRST).weight.detach().double()
    expected = (before + summed(model, WEIGHTS)[FIRST]).to(torch.bfloat16)
    assert torch.equal(model.merge_and_unload(WEIGHTS).get_submodule(FIRST).weight, expected)


def test_merging_by_svd():
    model = causal("llama")
    exact, before = summed(model, WEIGHTS), model.get_submodule(LAST).weight.detach().clone()
    added = (
        model.merge_and_unload(WEIGHTS, recipe="svd", rank=2).get_submodule(LAST).weight.detach()
        - before
    )
    error = (added - exact[LAST]).norm().item()
    assert error == pytest.approx(torch.linalg.svdvals(exact[LAST])[2:].norm().item(), rel=1e-4)


def test_a_merge_that_fails_changes_nothing():
    model = causal("llama")
    with torch.no_grad():
        list(model.moelora.expert(0).values())[-1].B[0, 0] = math.nan
    before, cls = copy.deepcopy(model.state_dict()), type(model)
    with pytest.raises(ValueError, match=r"not finite.*Nothing was changed"):
        model.merge_and_unload(WEIGHTS)
    assert type(model) is cls and all(
        torch.equal(v, before[k])
        for k, v in model.state_dict().items()
        if not model.moelora.owns(k)
    )


def test_quantised_and_tied_linears_are_not_merged_into(tmp_path):
    quanto = pytest.importorskip("optimum.quanto")
    base = causal_base("llama")
    quanto.quantize(base, weights=quanto.qint8)
    quanto.freeze(base)
    model = into(base)
    with pytest.raises(ValueError, match=rf"{FIRST} is a quantised QLinear.*export_merged"):
        model.merge_and_unload(WEIGHTS)
    model.export_merged(WEIGHTS, tmp_path)
    tied = into(causal_base("llama", tie_word_embeddings=True), target_modules=["lm_head"])
    with pytest.raises(ValueError, match=r"lm_head is tied to another"):
        tied.merge_and_unload(WEIGHTS)
    assert hasattr(tied, "moelora")


BAD = {
    "weights is empty": ({}, {}),
    "no expert 'law'.*expert_0": ({"law": 1.0}, {}),
    "weights is a list": (["expert_0"], {}),
    r"weights\['expert_0'\]=nan": ({"expert_0": math.nan}, {}),
    r"weights\['expert_0'\]=inf": ({"expert_0": math.inf}, {}),
    r"weights\['expert_0'\]='1'": ({"expert_0": "1"}, {}),
    "'mean' is unknown.*breadcrumbs.*ties": (WEIGHTS, {"recipe": "mean"}),
    "'ties' needs density": (WEIGHTS, {"recipe": "ties"}),
    r"'linear' has no option \['density'\]": (WEIGHTS, {"density": 0.5}),
    "'dare_linear' needs seed": (WEIGHTS, {"recipe": "dare_linear", "density": 0.5}),
    r"density=0 is out of range.*\(0": (WEIGHTS, {"recipe": "ties", "density": 0}),
    r"density \+ gamma": (WEIGHTS, {"recipe": "breadcrumbs", "density": 0.9, "gamma": 0.2}),
}
BAD_EXPORTS = {
    "rank=0 is too small": {"rank": 0},
    "rank=33 is more than.*at most 32": {"rank": 33},
    "rank=2.0 is a float": {"rank": 2.0},
    "'svd' needs rank": {"recipe": "svd"},
    "'ties' does not give a low rank: pass rank": {"recipe": "ties", "density": 0.5},
    "dtype=torch.int32": {"dtype": torch.int32},
}


@pytest.mark.parametrize("message", [*BAD, *BAD_EXPORTS])
def test_bad_merges_are_refused_and_nothing_is_written(message, tmp_path):
    model = causal("llama")
    weights, options = BAD.get(message) or (WEIGHTS, BAD_EXPORTS[message])
    rank = {"rank": 4} if message in BAD else {}
    with pytest.raises((ValueError, TypeError), match=message):
        model.export_merged(weights, tmp_path / "out", **rank, **options)
    if message in BAD:
        with pytest.raises((ValueError, TypeError), match=message):
            model.merge_and_unload(weights, **options)
    assert hasattr(model, "moelora") and not any(tmp_path.iterdir())
