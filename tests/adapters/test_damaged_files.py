"""Damaged and hostile adapter folders: each is a problem with a reason, soon, and never another
error.
"""

from __future__ import annotations

import json
import random
import struct
import time
from pathlib import Path
from typing import Any

import pytest
from adapters.peft_folders import CONFIG, WEIGHTS, edit_config, save_adapter
from bases import causal_base

from moelora.adapters.patterns import Patterns
from moelora.adapters.preflight import preflight
from moelora.adapters.reading import read_adapter

LINEAR = "model.layers.0.self_attn.q_proj"
SECONDS = 1.0


@pytest.fixture(scope="module")
def base():
    base = causal_base()
    base.config._name_or_path = "someone/llama-tiny"
    return base


@pytest.fixture
def folder(tmp_path) -> Path:
    """An adapter that names its base, with a copy of one of the base's own weights beside it."""
    fields = {"target_modules": ["q_proj", "v_proj"], "modules_to_save": ["model.norm"]}
    folder = save_adapter(tmp_path / "adapter", **fields)
    return Path(edit_config(folder, base_model_name_or_path="someone/llama-tiny"))


def problems(base: Any, folder: Path) -> list[str]:
    """What is wrong with the folder, found within the limit of processor time; no error is raised,
    and where there is none, everything can be read.
    """
    start = time.process_time()
    checked = preflight(base, {"a": folder})
    assert time.process_time() - start < SECONDS
    if checked.ok:
        adapter = checked.adapters["a"]
        assert all(A.shape[0] == B.shape[1] for A, B in map(adapter.factors, adapter.targets))
    return checked.problems


def flipped(content: bytes, draw: random.Random, end: int) -> bytes:
    """`content` with one bit before `end` turned over."""
    where = draw.randrange(end)
    return content[:where] + bytes([content[where] ^ 1 << draw.randrange(8)]) + content[where + 1 :]


def header_end(content: bytes) -> int:
    return 8 + struct.unpack("<Q", content[:8])[0]


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_every_bit_flip_and_truncation_is_told(base, folder, name):
    draw = random.Random(name)
    path = folder / name
    whole = path.read_bytes()
    end = len(whole) if name == CONFIG else header_end(whole)
    cuts = [draw.randrange(end) for _ in range(60)]
    told = 0
    for content in [flipped(whole, draw, end) for _ in range(300)] + [whole[:cut] for cut in cuts]:
        path.write_bytes(content)
        told += bool(problems(base, folder))
    # A bit of a comment or of a default may well be another one.
    assert told > 200
    for cut in cuts:
        path.write_bytes(whole[:cut])
        assert str(folder) in problems(base, folder)[0]


def nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


WRONG = [
    None, True, -1, 0, 2.5, 10**9, 10**4000, float("nan"), float("inf"), "", "x", "\0", "(",
    "x" * 5000, [], [3], ["x"], [["x"]], [{}], {}, {"x": 1}, {"x": "y"}, {"(": 1},
    {"q_proj": 10**9}, nested(20), nested(500), {"x": nested(300)},
]  # fmt: skip


def test_every_field_with_every_wrong_type_is_told_or_harmless(base, folder):
    path = folder / CONFIG
    good = json.loads(path.read_text())
    assert len(good) > 20
    for field in [*good, "a_field_of_the_future", "peft_type"]:
        for value in WRONG:
            path.write_text(json.dumps({**good, field: value}))
            problems(base, folder)
    for depth in range(700, 980, 4):
        # As deep as the parser goes, what shows the value may not.
        path.write_text('{"peft_type": "LORA", "future": ' + "[" * depth + "]" * depth + "}")
        assert "JSON" in problems(base, folder)[0]


def test_a_rank_that_would_take_terabytes_is_told_before_anything_is_made(base, folder):
    for change in ({"r": 10**9}, {"rank_pattern": {"q_proj": 10**9}}):
        (problem, *_) = problems(base, edit_config_of(folder, change))
        assert "rank 8 in the file and 1000000000" in problem


def edit_config_of(folder: Path, change: dict[str, Any]) -> Path:
    return Path(edit_config(folder, **change))


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000,
        '{"r": ' * 50_000,
        "[" * 400 + "]" * 400,
        '"text"',
        "3",
        "[]",
        "null",
        "\ufeff{}",
    ],
    ids=lambda text: text[:6],
)
def test_json_that_is_deep_or_not_an_object_is_a_value_error(folder, text):
    (folder / CONFIG).write_text(text)
    with pytest.raises(ValueError, match=f"{folder}.*JSON"):
        read_adapter(folder)
    (folder / CONFIG).write_text(json.dumps({"peft_type": "LORA", "future": nested(600)}))
    with pytest.raises(ValueError, match=f"{folder}.*nested more than"):
        read_adapter(folder)


def write_header(folder: Path, header: Any, data: int = 4096) -> None:
    text = json.dumps(header).encode()
    content = struct.pack("<Q", len(text)) + text + b"\0" * data
    (folder / WEIGHTS).write_bytes(content)


DTYPES = (
    "F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F4", "F6_E2M3",
    "I64", "I8", "U16", "U64", "BOOL", "C64", "X9", "", 3,
)  # fmt: skip
SHAPES = ([10**9, 0], [0, 10**9], [0], [], [8, 32, 1], [-1, 4], [2**63, 2], "x", [[8]], None)


def test_headers_of_every_dtype_and_shape_are_told(base, folder):
    keys = [f"base_model.model.{LINEAR}.lora_{part}.weight" for part in "AB"]
    odd = ["", "a" * 10**6, "base_model.model.lm_head.weight", f"{keys[0]}\0", "__metadata__"]
    for dtype in DTYPES:
        for size in (0, 256, 512, 1024, 2048):
            entry = {"dtype": dtype, "shape": [8, 32], "data_offsets": [0, size]}
            other = {"dtype": dtype, "shape": [32, 8], "data_offsets": [size, 2 * size]}
            write_header(folder, {keys[0]: entry, keys[1]: other}, 2 * size)
            problems(base, folder)
            write_header(folder, {keys[0]: entry, odd[2]: other}, 2 * size)
            problems(base, folder)
    for shape in SHAPES:
        entry = {"dtype": "F32", "shape": shape, "data_offsets": [0, 0]}
        write_header(folder, {keys[0]: entry, keys[1]: entry}, 0)
        assert problems(base, folder)
    for key in odd:
        entry = {"dtype": "F32", "shape": [8, 32], "data_offsets": [0, 1024]}
        write_header(folder, {key: entry}, 1024)
        assert problems(base, folder)
    for header in ([], "x", 3, None, {keys[0]: 3}, {keys[0]: {}}, nested(900)):
        write_header(folder, header)
        assert str(folder) in problems(base, folder)[0]


# Each holds Python's own `re` for longer than anyone waits.
SLOW = r"(?:.|.)*(?:.|.)*(?:.|.)*(?:.|.)*[!?]"
CATASTROPHES = [
    SLOW,
    r"(a|a)*b",
    r"(.*)*(.*)*(.*)*\d\d$x",
    r"((\w|\w)+\.?)+!",
    r"(.*.*.*.*.*.*.*.*.*.*)+!",
]
PLACES = {
    "target_modules": lambda p: {"target_modules": p},
    "exclude_modules": lambda p: {"exclude_modules": p},
    "rank_pattern": lambda p: {"rank_pattern": {p: 4}},
    "alpha_pattern": lambda p: {"alpha_pattern": {p: 4}},
    "layers_pattern": lambda p: {"layers_to_transform": [0], "layers_pattern": [p]},
}


@pytest.mark.parametrize("place", PLACES)
def test_catastrophic_patterns_end_soon(base, folder, place):
    whole = (folder / CONFIG).read_text()
    for pattern in CATASTROPHES:
        (folder / CONFIG).write_text(whole)
        edit_config(folder, **PLACES[place](pattern))
        told = problems(base, folder)
        assert told or place in ("rank_pattern", "alpha_pattern", "exclude_modules")


def test_patterns_have_limits_of_time_and_length():
    slow = Patterns(num_linears=2)
    name = "model.layers.0." + "a" * 300
    start = time.process_time()
    with pytest.raises(ValueError, match="patterns take more than 0.5 seconds"):
        slow.matches(SLOW, name)
    # The limit is for all patterns together.
    for _ in range(1000):
        with pytest.raises(ValueError, match="name the modules instead"):
            slow.matches("a", "a")
    assert time.process_time() - start < SECONDS
    with pytest.raises(ValueError, match="more than 65536 letters"):
        Patterns(1).matches("a" * 70_000, "a")
    for broken in ("(", "(" * 5000, "x{99999999999}", "*", "[z-a]", r"\1"):
        with pytest.raises(ValueError, match="not a regular expression"):
            Patterns(1).matches(broken, "a")


def test_patterns_match_as_peft_matches_them():
    patterns = Patterns(3)
    assert (
        patterns.first(["self_attn", "q_pro", r"\d\..*q_proj", "q_proj"], LINEAR) == r"\d\..*q_proj"
    )
    assert patterns.first([f"^{LINEAR}", "q_proj"], LINEAR) == f"^{LINEAR}"
    assert patterns.first(["v_proj"], LINEAR) is None
    assert patterns.matches(r".*\.(q|v)_proj", LINEAR) and not patterns.matches("q_proj", LINEAR)


def test_a_pattern_for_each_of_many_linears_is_within_the_limits():
    parts = ("a.q", "a.k", "a.v", "a.o", "m.x", "m.y", "m.z")
    names = [f"model.layers.{i}.{part}" for i in range(80) for part in parts]
    patterns = Patterns(len(names))
    keys = ["^" + name.replace(".", r"\.") for name in names]
    assert [patterns.first(keys, name) for name in names] == keys


@pytest.mark.parametrize(
    "where", ["x" * 5000, "a\0b", 3, None, ["x"], "/proc/self/mem", "../../.."]
)
def test_x_lora_checkpoints_that_point_anywhere(base, folder, where):
    (folder / CONFIG).write_text(
        json.dumps({"peft_type": "XLORA", "adapters": {"m\0": where, "": where}})
    )
    try:
        assert preflight(base, folder).problems
    except ValueError as error:
        assert str(folder) in str(error)
