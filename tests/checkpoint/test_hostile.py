"""Hundreds of damaged or hostile files: a ValueError that names the file, within a second."""

import json
import random
import struct
import time
from contextlib import contextmanager

import pytest
import torch
from bases import causal_base
from checkpoint.stored import WEIGHTS, contents, load, logits, rewrite, same, saved
from safetensors import safe_open

from moelora import MoeLoraForCausalLM
from moelora.checkpoint.reading import read, sealed
from moelora.validation import MAX_RANK, MAX_WIDTH

# What a machine with other work to do still keeps.
SECONDS = 1.0
LINEAR = "model.layers.0.mlp.down_proj"
DEEP = "[" * 100_000
DEEP_OBJECT = '{"a":' * 100_000


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    folder = tmp_path_factory.mktemp("original")
    saved(folder)
    return folder / "experts"


@pytest.fixture
def folder(original, tmp_path):
    for name, data in contents(original).items():
        (tmp_path / name).write_bytes(data)
    return tmp_path


def read_then_load(folder):
    # What `read` refuses, loading refuses the same way, and a base costs time.
    read(folder / WEIGHTS)
    return MoeLoraForCausalLM.from_pretrained(folder, base=causal_base())


@contextmanager
def refused(path, match=None):
    began = time.process_time()
    with pytest.raises(ValueError, match=match) as caught:
        yield
    assert time.process_time() - began < SECONDS
    assert str(path) in str(caught.value), str(caught.value)[:300]


def test_every_bit_of_the_header_matters(folder):
    path = folder / WEIGHTS
    whole = path.read_bytes()
    end = 8 + struct.unpack("<Q", whole[:8])[0]
    dice = random.Random(0)
    flips = [*range(64), *(dice.randrange(64, 8 * end) for _ in range(300))]
    for bit in flips:
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        with refused(path):
            read_then_load(folder)


def test_every_length_of_a_cut_file_is_noticed(folder):
    path = folder / WEIGHTS
    whole = path.read_bytes()
    dice = random.Random(1)
    for length in [*range(12), *(dice.randrange(12, len(whole)) for _ in range(80))]:
        path.write_bytes(whole[:length])
        with refused(path):
            read(path)


def _metadata(path):
    with safe_open(path, framework="pt") as file:
        return file.metadata()


def _with_texts(path, **texts):
    """The file with other metadata, under a hash that fits: someone wants it to be believed."""
    whole = path.read_bytes()
    length = struct.unpack("<Q", whole[:8])[0]
    header = json.loads(whole[8 : 8 + length])
    metadata = header["__metadata__"]
    header["__metadata__"] = sealed(
        texts.get("config", metadata["moelora_config"]), texts.get("base", metadata["base"])
    )
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + whole[8 + length :])


NOT_AN_OBJECT = ["", "{ no json", "5", "[]", "null", '"text"', DEEP, DEEP_OBJECT, "9" * 10_000]


@pytest.mark.parametrize("which", ["config", "base"])
def test_a_header_that_does_not_hold_json_objects(folder, which):
    for text in [*NOT_AN_OBJECT, "{}", '{"shapes": 5}', '{"format_version": []}']:
        (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes())
        _with_texts(folder / WEIGHTS, **{which: text})
        with refused(folder / WEIGHTS):
            read(folder / WEIGHTS)


def _mutations(value, dice):
    """Something like JSON value `value`, at one place of which something else stands."""
    others = [None, True, -1, 0, 2.5, 10**9, 10**400, "", "text", [], [None], {}, {"a": 1}, [[1]]]
    if isinstance(value, dict) and value and dice.random() < 0.9:
        key = dice.choice(list(value))
        return value | {key: _mutations(value[key], dice)}
    if isinstance(value, list) and value and dice.random() < 0.8:
        place = dice.randrange(len(value))
        return [*value[:place], _mutations(value[place], dice), *value[place + 1 :]]
    return dice.choice(others)


def test_a_base_s_fingerprint_with_anything_at_any_place(folder):
    path = folder / WEIGHTS
    dice = random.Random(2)
    whole = path.read_bytes()
    base = json.loads(_metadata(path)["base"])
    for _ in range(100):
        mutated = _mutations(base, dice)
        if mutated == base:
            continue
        path.write_bytes(whole)
        _with_texts(path, base=json.dumps(mutated))
        began = time.process_time()
        try:
            read_then_load(folder)
        except ValueError as error:
            assert str(folder) in str(error), mutated
        # A None for a shape says that the weight is quantised; which values are sampled is open.
        else:
            assert None in mutated["shapes"].values() or mutated["shapes"] == base["shapes"]
        assert time.process_time() - began < SECONDS


WRONG = [
    True,
    -1,
    2.5,
    10**9,
    10**400,
    "text",
    [],
    [None],
    [10**9] * 4,
    {},
    {"a": 1},
    [[1]],
    [["a"]],
]


def test_wrong_types_and_sizes_in_every_field_of_the_configuration(folder):
    path = folder / WEIGHTS
    whole = path.read_bytes()
    fields = json.loads(_metadata(path)["moelora_config"])
    expected = logits(load(folder))
    refusals = 0
    for name in fields:
        for value in WRONG:
            path.write_bytes(whole)
            rewrite(folder, config={name: value})
            began = time.process_time()
            try:
                model = read_then_load(folder)
            except ValueError as error:
                refusals += 1
                assert str(folder) in str(error), (name, value, error)
            else:
                # Where another value is as good: a name, a coefficient, what does not act here.
                assert logits(model).shape == expected.shape, (name, value)
            assert time.process_time() - began < SECONDS, (name, value)
    assert refusals > 300


@pytest.mark.parametrize(
    "fields, said",
    [
        ({"num_experts": 10**9}, "num_experts is not the number of expert_names"),
        ({"num_experts": 10**9, "expert_names": None}, "num_experts is not the number"),
        ({"r": 10**9}, "r=1000000000 is too large"),
        ({"r": MAX_RANK}, rf"asks for tensors of \[{4 * MAX_RANK}"),
        ({"expert_ranks": {LINEAR: [10**9] * 4}}, "=1000000000 is too large"),
        ({"expert_ranks": {LINEAR: [MAX_RANK] * 4}}, rf"asks for tensors of \[{4 * MAX_RANK}"),
        ({"router": "mlp", "router_options": {"hidden_size": 10**9}}, "=1000000000 is too large"),
        ({"router": "mlp", "router_options": {"hidden_size": MAX_WIDTH}}, "asks for tensors of"),
        ({"sites": None, "target_modules": "(a+a+)+$" + "x" * 50}, "sites is empty"),
        ({"sites": [[LINEAR]] * 2}, "a linear is in two sites"),
        ({"block_sizes": {LINEAR: [10**12, 32]}}, "block_sizes are .1000000000000. wide"),
        ({"base_folder": "../../elsewhere"}, "not the name of a base's folder"),
        ({"base_config": {"dtype": "nn"}}, "dtype 'nn', which torch lacks"),
        ({"model_type": "llama"}, "not of model_type 'moelora'"),
        ({"base_revision": 5}, "base_revision is not a string"),
        ({"architectures": ["x"]}, r"has fields \['architectures'\]"),
    ],
)
def test_what_asks_for_too_much_is_refused_before_anything_is_built(folder, fields, said):
    rewrite(folder, config=fields)
    base = causal_base()
    with refused(folder / WEIGHTS, said):
        read(folder / WEIGHTS)
    with refused(folder / WEIGHTS):
        MoeLoraForCausalLM.from_pretrained(folder, base=base)
    assert not hasattr(base, "moelora")


@pytest.mark.parametrize("text", NOT_AN_OBJECT)
def test_a_damaged_generation_config_is_named_and_leaves_the_base_alone(folder, text):
    (folder / "generation_config.json").write_text(text)
    base = causal_base()
    with refused(folder / "generation_config.json"):
        load(folder, base=base)
    assert not hasattr(base, "moelora")


@pytest.mark.parametrize("text", NOT_AN_OBJECT)
def test_a_damaged_config_json_does_not_keep_the_weights_from_loading(folder, original, text):
    expected = load(original)
    config = expected.moelora_config
    (folder / "config.json").write_text(text)
    assert same(MoeLoraForCausalLM.from_pretrained(folder), expected)
    # As it comes from the Auto class, where config.json was damaged a moment later.
    assert same(MoeLoraForCausalLM.from_pretrained(folder, config=config), expected)


def test_another_kind_of_tensor_is_not_taken_for_weights(folder):
    def whole_numbers(held):
        key = next(key for key in held if key.endswith("lora_A.weight"))
        held[key] = held[key].to(torch.int32)

    rewrite(folder, whole_numbers)
    with refused(folder / WEIGHTS):
        load(folder)


def test_a_layer_that_the_base_lacks_is_named(tmp_path):
    saved(tmp_path, router_scope="model", router_layer=1)
    rewrite(tmp_path / "experts", config={"router_layer": 10**9})
    base = causal_base()
    with refused(tmp_path / "experts" / WEIGHTS):
        load(tmp_path / "experts", base=base)
    assert not hasattr(base, "moelora")
