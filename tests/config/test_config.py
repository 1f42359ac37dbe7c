"""Every field of the configuration is checked, by name and with what was expected; good ones
survive JSON.
"""

import json
import math

import pytest
import torch
from bases import causal_base
from core.mixtures import causal, factors, tokens

from moelora import ROUTERS, MoeLoraConfig
from moelora.config_checks import (
    AUX_LOSS_WINDOWS,
    EXPERT_INITS,
    FORMAT_VERSION,
    ROUTER_POOLINGS,
    ROUTER_SCOPES,
    ROUTING_LEVELS,
)
from moelora.placement import PLACEMENTS

COUNTS = {
    "num_experts": 1,
    "num_shared_experts": 0,
    "num_experts_per_tok": 1,
    "r": 1,
    "router_layer": 0,
    "router_prefix_tokens": 1,
    "layers_to_transform": 0,
}
NOT_NEGATIVE = [
    "router_aux_loss_coef",
    "router_z_loss_coef",
    "router_bias_update_rate",
    "expert_target_loss_coef",
]
SHARES = ["lora_dropout", "expert_dropout", "router_jitter_noise"]
NUMBERS = ["lora_alpha", *NOT_NEGATIVE, *SHARES]
FLAGS = ["use_rslora", "share_lora_A", "norm_topk_prob", "router_input_norm", "null_expert"]
CHOICES = {
    "router": ROUTERS,
    "expert_init": EXPERT_INITS,
    "routing_level": ROUTING_LEVELS,
    "router_scope": ROUTER_SCOPES,
    "router_pooling": ROUTER_POOLINGS,
    "router_aux_loss_window": AUX_LOSS_WINDOWS,
    "expert_placement": PLACEMENTS,
}
NAME_LISTS = ["expert_names", "modules_to_save", "target_modules", "target_blocks"]
# Checked by tests of their own: router_options in routers/test_options.py, layers and patterns in
# injection/test_by_layer.py, expert_activation in adapters/test_not_lora.py.
FREE = {
    *("expert_activation", "block_sizes", "expert_sources"),
    *("format_version", "sites", "expert_ranks", "expert_scaling", "router_options"),
    *("experts_per_layer", "layer_experts", "rank_pattern", "alpha_pattern"),
}


def test_every_field_is_in_one_of_these_tests():
    listed = {*COUNTS, *NUMBERS, *FLAGS, *CHOICES, *NAME_LISTS, *FREE}
    own = {name for name in MoeLoraConfig.field_names() if not name.startswith("base_")}
    assert own == listed, "a new field needs a check and a line in this file"


def test_sources_are_by_expert():
    with pytest.raises(TypeError, match="expert_sources is not a dict"):
        MoeLoraConfig(expert_sources="somewhere")
    assert MoeLoraConfig(expert_sources={"expert_0": "one"}).expert_sources == {"expert_0": "one"}


def refused(error, match, **fields):
    with pytest.raises(error, match=match):
        MoeLoraConfig(**fields)


@pytest.mark.parametrize("name", COUNTS)
def test_counts_are_integers_that_are_large_enough(name):
    refused(ValueError, f"{name}=.*at least {COUNTS[name]}", **{name: COUNTS[name] - 1})
    for wrong in ("4", 2.0, True, math.nan):
        refused(TypeError, f"{name}=.*expected an integer", **{name: wrong})
    given = MoeLoraConfig(
        **{"num_experts": 2, "num_experts_per_tok": 1, name: max(COUNTS[name], 1)}
    )
    assert getattr(given, name) == max(COUNTS[name], 1)


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_are_finite_and_in_range(name):
    for wrong in (math.nan, math.inf, -1.0, *([1.0] if name in SHARES else [])):
        refused(ValueError, f"{name}=.*out of range", **{name: wrong})
    for wrong in ("1", True, None):
        refused(TypeError, f"{name}=.*expected a number", **{name: wrong})
    assert getattr(MoeLoraConfig(**{name: 0.5}), name) == 0.5


def test_zero_is_a_number_for_losses_and_none_for_alpha():
    refused(ValueError, "lora_alpha=0", lora_alpha=0)
    for name in (*NOT_NEGATIVE, *SHARES):
        assert getattr(MoeLoraConfig(**{name: 0}), name) == 0


@pytest.mark.parametrize("name", FLAGS)
def test_flags_are_booleans(name):
    for wrong in ("yes", 1, None):
        refused(TypeError, f"{name}=.*True or False", **{name: wrong})
    assert getattr(MoeLoraConfig(**{name: False}), name) is False


@pytest.mark.parametrize("name", CHOICES)
def test_an_unknown_choice_lists_the_valid_ones(name):
    for wrong in ("no-such-thing", None, 3, ["top_k"]):
        refused(
            ValueError,
            f"{name}=.*{'.*'.join(sorted(CHOICES[name]))}" if name == "router" else name,
            **{name: wrong},
        )
    with pytest.raises(ValueError) as caught:
        MoeLoraConfig(**{name: "no-such-thing"})
    assert all(choice in str(caught.value) for choice in CHOICES[name])
    for choice in CHOICES[name]:
        blends = name == "router" and ROUTERS[choice].reads_prompt
        level = "token" if blends else "sequence"
        assert getattr(MoeLoraConfig(**{"routing_level": level, name: choice}), name) == choice


@pytest.mark.parametrize("name", NAME_LISTS)
def test_lists_of_names_hold_strings(name):
    for wrong in (3, [1, 2], ["a", ""], [["a"]]):
        refused(TypeError, f"{name}=.*list of non-empty strings", num_experts=2, **{name: wrong})
    for given in (["b", "a"], ("b", "a")):
        assert getattr(MoeLoraConfig(num_experts=2, **{name: given}), name) == ["b", "a"]


@pytest.mark.parametrize("name", ["expert_names", "modules_to_save"])
def test_a_lone_string_is_no_list_of_letters(name):
    refused(TypeError, f"{name}='ab'", num_experts=2, **{name: "ab"})


def test_expert_names_are_as_many_as_experts_and_all_different():
    refused(ValueError, "2 different names", num_experts=2, expert_names=["a"])
    refused(ValueError, "2 different names", num_experts=2, expert_names=["a", "a"])
    config = MoeLoraConfig(num_experts=2, expert_names=["math", "code"])
    assert config.expert_index("code") == 1
    with pytest.raises(ValueError, match=r"no expert 'law'.*math, code"):
        config.expert_index("law")
    assert MoeLoraConfig(num_experts=2).expert_names == ["expert_0", "expert_1"]


def test_targets_are_names_or_a_regex():
    refused(ValueError, "target_modules is empty", target_modules=[])
    refused(ValueError, "target_modules is empty", target_modules="")
    refused(ValueError, "not a valid regular expression", target_modules="(q_proj")
    assert MoeLoraConfig(target_modules={"v", "q"}).target_modules == ["q", "v"]
    assert MoeLoraConfig(target_modules=r".*\.[qv]_proj").target_modules == r".*\.[qv]_proj"


def test_layers_are_one_number_or_several():
    refused(ValueError, "layers_to_transform is empty", layers_to_transform=[])
    refused(ValueError, "layers_to_transform=-1", layers_to_transform=[0, -1])
    refused(TypeError, "layers_to_transform='1'", layers_to_transform=[0, "1"])
    assert MoeLoraConfig(layers_to_transform=(1, 0)).layers_to_transform == [0, 1]
    assert MoeLoraConfig(layers_to_transform=0).layers_to_transform == 0


def test_no_token_chooses_more_experts_than_there_are():
    refused(
        ValueError, "num_experts_per_tok=3.*num_experts=2", num_experts=2, num_experts_per_tok=3
    )
    # The default of 2 with one expert, too.
    refused(ValueError, "Lower num_experts_per_tok", num_experts=1)


@pytest.mark.parametrize("name", ["r", "lora_alpha"])
def test_one_value_for_each_expert_or_one_for_all(name):
    refused(ValueError, f"{name} lists 2 values for num_experts=3", num_experts=3, **{name: [4, 8]})
    refused(ValueError, f"{name}=", num_experts=3, **{name: [4, 8, 0]})
    refused(TypeError, f"{name}=", num_experts=3, **{name: [4, 8, "8"]})
    refused(TypeError, f"{name}=", num_experts=3, **{name: [4, 8, True]})


def test_scaling_is_alpha_over_rank_for_each_expert():
    config = MoeLoraConfig(num_experts=3, r=[1, 4, 16], lora_alpha=[2, 2, 8])
    assert (config.ranks, config.scaling) == ((1, 4, 16), (2.0, 0.5, 0.5))
    assert MoeLoraConfig(num_experts=3, r=[1, 4, 16], lora_alpha=8, use_rslora=True).scaling == (
        8,
        4,
        2,
    )


def test_single_linears_have_ranks_and_scaling_of_their_own():
    fields = {"expert_ranks": {"q": [0, 8, 1]}, "expert_scaling": {"q": [1.0, 0.25, -2.0]}}
    config = MoeLoraConfig(num_experts=3, r=4, lora_alpha=4, **fields)
    assert (config.ranks_of("q"), config.scaling_of("q")) == ((0, 8, 1), (1.0, 0.25, -2.0))
    assert (config.ranks_of("v"), config.scaling_of("v")) == ((4, 4, 4), (1.0, 1.0, 1.0))
    assert config.to_dict()["expert_ranks"] == fields["expert_ranks"]
    refused(
        ValueError,
        r"expert_ranks\['q'\]=\[1\]: .* each of the 3",
        num_experts=3,
        expert_ranks={"q": [1]},
    )
    refused(
        ValueError,
        r"expert_ranks\['q'\]=-1",
        num_experts=1,
        num_experts_per_tok=1,
        expert_ranks={"q": [-1]},
    )
    refused(
        ValueError,
        "expert_scaling",
        num_experts=1,
        num_experts_per_tok=1,
        expert_scaling={"q": [math.nan]},
    )


def test_an_unknown_field_lists_the_fields():
    with pytest.raises(ValueError, match=r"no field \['top_k'\]") as caught:
        MoeLoraConfig(top_k=2)
    assert all(name in str(caught.value) for name in MoeLoraConfig.field_names())
    # transformers swallows these as sampling settings where a config does not look first.
    refused(ValueError, "no field", temperature=0.5)
    refused(ValueError, r"\['rank', 'target_module'\]", rank=3, target_module="x")


def test_sites_and_format_version_of_a_damaged_file_are_refused():
    for wrong in ("x", [], [["a"], "b"], [[]], [[3]]):
        refused((TypeError, ValueError), "sites", sites=wrong)
    refused(TypeError, "format_version", format_version="1")
    refused(ValueError, "upgrade moelora", format_version=FORMAT_VERSION + 1)


FULL = dict(
    num_experts=2,
    r=[2, 4],
    lora_alpha=[1, 2.5],
    lora_dropout=0.1,
    use_rslora=True,
    expert_names=["math", "code"],
    target_modules=["q_proj"],
    layers_to_transform=[1],
    modules_to_save=["lm_head"],
    num_experts_per_tok=1,
    routing_level="sequence",
    router="mlp",
    router_options={"hidden_size": 7},
    router_scope="model",
    router_layer=1,
    router_prefix_tokens=5,
    router_pooling="attention",
    router_input_norm=True,
    null_expert=True,
    norm_topk_prob=False,
    router_jitter_noise=0.1,
    router_aux_loss_coef=0.2,
    router_z_loss_coef=0.3,
    router_aux_loss_window="micro_batch",
    router_bias_update_rate=0.4,
    expert_target_loss_coef=0.5,
)


def test_pooling_is_for_prompts_and_the_name_of_no_expert_is_taken():
    refused(ValueError, "router_pooling='last'.*routing_level='token'", router_pooling="last")
    refused(ValueError, r"\(base\)", num_experts=2, expert_names=["math", "(base)"])
    names = MoeLoraConfig(
        num_experts=2, expert_names=["math", "code"], null_expert=True
    ).choice_names
    assert names == ["math", "code", "(base)"]


def test_a_config_survives_dicts_json_and_folders(tmp_path):
    config = MoeLoraConfig(**FULL)
    changed = {
        n for n in MoeLoraConfig.field_names() if getattr(config, n) != getattr(MoeLoraConfig(), n)
    }
    assert changed == set(FULL), "a field at its default would pass even if it were lost"
    config.save_pretrained(tmp_path)
    (tmp_path / "own.json").write_text(json.dumps(config.own_fields()))
    for again in (
        MoeLoraConfig.from_dict(config.to_dict()),
        MoeLoraConfig.from_dict(json.loads(config.to_json_string())),
        MoeLoraConfig.from_pretrained(tmp_path),
        MoeLoraConfig.from_json_file(tmp_path / "own.json"),
        config.without_base(),
    ):
        assert {n: getattr(again, n) for n in FULL} == FULL


@torch.no_grad()
@pytest.mark.parametrize("rslora", [False, True])
def test_forced_experts_of_mixed_ranks_use_their_own_factors_and_scaling(rslora):
    mixed = dict(num_experts=3, r=[1, 3, 8], lora_alpha=[3, 1, 16], use_rslora=rslora)
    model = causal(**mixed)
    for e, (r, alpha) in enumerate(zip(mixed["r"], mixed["lora_alpha"])):
        merged = causal_base()
        for name, (a, b) in factors(model, e).items():
            assert a.shape[0] == b.shape[1] == r
            scale = alpha / (math.sqrt(r) if rslora else r)
            merged.get_submodule(name).weight += scale * b @ a
        with model.use_experts(f"expert_{e}"):
            # The same sums, in another order.
            torch.testing.assert_close(
                model(tokens()).logits, merged(tokens()).logits, rtol=1e-4, atol=2e-5
            )
