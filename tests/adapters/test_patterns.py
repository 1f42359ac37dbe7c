"""Patterns of adapters: matched as `re` matches them, and as many as a large model has linears."""

from __future__ import annotations

import re

import pytest

from moelora.adapters.patterns import Patterns

NAMES = [f"model.layers.{i // 4}.self_attn.{'qkvo'[i % 4]}_proj" for i in range(2_000)]


def test_the_names_of_a_large_model_are_neither_too_long_nor_too_slow():
    """What `export_expert` writes is read again."""
    patterns = Patterns(len(NAMES))
    targets = "|".join(map(re.escape, NAMES))
    assert all(patterns.matches(targets, name) for name in NAMES)
    assert not patterns.matches(targets, "x" + NAMES[0])
    keys = ["^" + re.escape(name) for name in NAMES]
    assert [patterns.first(keys, name) for name in NAMES] == keys
    assert patterns.first(keys, "spare." + NAMES[0]) is None


@pytest.mark.parametrize(
    "keys",
    [
        ["q_proj", "^a\\.q_proj"],
        ["^a\\.q_proj", "q_proj"],
        ["^q_proj", "^a|q_proj"],
        ["^b\\.q_proj", ".*proj"],
        ["^a.q_proj", "^a\\.q_proj"],
        ["^", ""],
        ["^a\\.q_proj|b", "a\\.q_proj|b"],
    ],
    ids=str,
)
def test_the_first_that_matches_is_that_of_peft(keys):
    for linear in ("a.q_proj", "q_proj", "b", "x.a.q_proj", "x.b", ""):
        matching = [key for key in keys if re.match(rf"(.*\.)?({key})$", linear)]
        assert Patterns(1).first(keys, linear) == next(iter(matching), None)
