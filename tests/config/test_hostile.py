"""Values of a damaged or hostile file: a clear ValueError or TypeError within a second."""

from __future__ import annotations

import re
import time
from typing import Any

import pytest

from moelora import MoeLoraConfig
from moelora.backtracking import check_regex, plain_names
from moelora.validation import MAX_TOTAL_RANK, expert_name_problem


def nested(kind: type, depth: int = 100_000) -> Any:
    """A list in a list in a list …, or a dict of those."""
    value: Any = kind()
    for _ in range(depth):
        value = [value] if kind is list else {"a": value}
    return value


DEEP_LIST = nested(list)
DEEP_DICT = nested(dict)
LOOP: list[Any] = []
LOOP.extend([LOOP, LOOP])
WRONG = {
    "a deep list": DEEP_LIST,
    "a deep dict": DEEP_DICT,
    "a list in itself": LOOP,
    "an object": object(),
    "a list of objects": [object()],
    "bytes": b"x",
    "a huge integer": 10**5000,
    "minus a huge integer": -(10**5000),
    "a complex number": 1j,
    "a dict by numbers": {1: 2},
}


def refused(match: str = ".", **fields: Any) -> str:
    start = time.perf_counter()
    with pytest.raises((ValueError, TypeError), match=match) as caught:
        MoeLoraConfig(**fields)
    assert time.perf_counter() - start < 1
    assert len(str(caught.value)) < 3000
    return str(caught.value)


@pytest.mark.parametrize("value", WRONG)
@pytest.mark.parametrize("name", MoeLoraConfig.field_names())
def test_a_value_of_a_wrong_type_is_named(name, value):
    if name == "base_config" and value == "a dict by numbers":
        pytest.skip("a dict, which is all that is asked of it")
    message = refused(**{name: WRONG[value]})
    assert name in message or name.replace("_", " ") in message, message
    assert "limit" not in message, "Python's words for an integer that it does not print"


@pytest.mark.parametrize("name", ["id2label", "dtype", "torch_dtype"])
def test_what_transformers_keeps_is_refused_with_the_same_errors(name):
    refused("wrong type", **{name: "nothing"})
    refused("nested deeper", **{name: DEEP_LIST})


def test_sizes_that_would_fill_the_memory_are_refused():
    refused("num_experts=.*too large.*65536", num_experts=10**9)
    refused("num_experts_per_tok=.*too large", num_experts_per_tok=10**9)
    refused("r=1000000000 is too large", r=10**9)
    refused("r=.*too large", num_experts=2, r=[4, 10**9])
    refused(f"ranks of r add up.*{MAX_TOTAL_RANK}", num_experts=1000, r=2000)
    one = {"num_experts": 1, "num_experts_per_tok": 1}
    refused(r"expert_ranks\['q'\].*too large", **one, expert_ranks={"q": [10**9]})
    refused("ranks of q add up", num_experts=60, r=1, expert_ranks={"q": [60_000] * 60})
    assert MoeLoraConfig(num_experts=4096, r=1).num_experts == 4096


def test_huge_lists_are_refused():
    many = ["q_proj"] * 2_000_000
    for name in ("target_modules", "expert_names", "modules_to_save", "layers_to_transform"):
        refused(f"{name} holds too much", **{name: many})
    refused("sites holds too much", sites=[many])
    refused("expert_names.*8 different names", expert_names=many[:200_000])


CATASTROPHIC = [
    "(a+)+$",
    "(a|aa)+$",
    "(a*)*b",
    "(.*)*x",
    "(.|a)*b",
    "(?i)(ab|AB)*x",
    "(a|b|ab)*c",
    "(x+x+)+y",
    ".*.*.*.*.*.*.*x",
    "a?" * 30 + "a" * 30,
    "(a|a)" * 40 + "b",
    "(?:a{0,9999}){0,9999}b",
    "((a?){30}){30}b",
    r"model\.layers\.(a+)+$",
    "(?=(a+)+$)x",
    "(?!(a+)+$)x",
    "(?<=x)(a+)+$",
    "(?>(a+)+b)c",
    "(?:(a+)+b)?+c",
    r"(b)?(?(1)(a+)+c|(a+)+d)",
    r"((a+)\2)+x",
    "(?P<n>a+)+?b",
]


@pytest.mark.parametrize("pattern", CATASTROPHIC)
def test_patterns_that_take_forever_are_refused(pattern):
    refused("target_modules=.*too many ways", target_modules=pattern)


def test_long_and_deep_patterns_are_refused():
    refused("expected at most 10000", target_modules="a" * 10_001)
    refused("not a valid regular expression", target_modules="(" * 4_000 + "a" + ")" * 4_000)
    refused("not a valid regular expression", target_modules="a{99999999999999999999}")


def test_an_alternation_of_names_is_valid_however_long():
    names = [f"model.layers.{i // 4}.self_attn.{'qkvo'[i % 4]}_proj" for i in range(2_000)]
    pattern = "|".join(map(re.escape, names))
    start = time.perf_counter()
    assert plain_names(pattern) == set(names) and len(pattern) > 60_000
    assert MoeLoraConfig(target_modules=pattern).target_modules == pattern
    assert time.perf_counter() - start < 0.5
    # Anything else keeps its limit.
    for other in (f"({pattern})", f"{pattern}|", f"{pattern}|(a+)+b", f"{pattern}|a.b", "a|b*"):
        assert plain_names(other) == set()
    refused("expected at most 10000", target_modules=f"{pattern}|a.b")


NAMES = [
    "model.layers.10.self_attn.q_proj",
    "model.vision_tower.vision_model.encoder.layers.11.self_attn.out_proj",
    "model.decoder.layers.1.EncDecAttention.v",
    "a" * 80,
    "." * 80,
]


@pytest.mark.parametrize(
    "pattern",
    [
        r".*\.(q|k)_proj",
        r".*decoder.*(SelfAttention|EncDecAttention).*(q|v)$",
        r"^(?!.*vision).*(?:q|k|v)_proj$",
        r"model\.layers\.(1[0-9]|2[0-3])\.(self_attn|mlp)\.(q|k|v|o|gate|up|down)_proj",
        r"(?:.*?(?:language|text).*?(?:self_attn|attention|attn).*?(?:k_proj|v_proj|out_proj).*?)"
        r"|(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|attention)\.(?:(?:q_proj|k_proj)))",
        r"(.*\.)?q_proj",
        r".*model.*layers.*[0-5].*self_attn.*(q|k|v).*",
        r".*\.layers\.\d+\.(attention|mlp)\.[a-z_]+",
        r"(?:.*\.)?layers\.\d+\.\w+\.(?:q|k)_proj",
        r"(?i:MODEL\.).*_proj",
        r"(?:model\.)?(?:decoder\.)?layers\.\d+\..*",
        r".*.*.*x",
        r"all-linear",
    ],
)
def test_patterns_that_people_write_are_valid_and_fast(pattern):
    check_regex("target_modules", pattern)
    start = time.perf_counter()
    for name in NAMES:
        re.fullmatch(pattern, name)
    assert time.perf_counter() - start < 0.2


@pytest.mark.parametrize(
    "name", ["a/b", "a\\b", "..", ".hidden", "con", "x" * 97, " a", "a\n", "a:b"]
)
def test_the_config_and_add_expert_refuse_the_same_names(name):
    assert expert_name_problem(name) is not None
    refused("expert_names: the name .*fit for a folder", num_experts=2, expert_names=["a", name])


def test_names_that_differ_in_case_alone_are_refused():
    refused("'math' and 'Math'.*case alone", num_experts=2, expert_names=["math", "Math"])
    assert expert_name_problem("Math") is None
    assert "is a int; expected a string" in str(expert_name_problem(3))


def test_every_field_is_documented_on_a_line_of_its_own():
    documented = re.findall(r"^ {8}(\w+): .", MoeLoraConfig.__doc__ or "", re.M)
    assert documented == [*dict.fromkeys(documented)]
    assert set(documented) == set(MoeLoraConfig.field_names())
