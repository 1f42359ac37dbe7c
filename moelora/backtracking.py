"""Regular expressions that a backtracking engine matches in reasonable time, told from those that
can take forever.
"""

from __future__ import annotations

import math
import re
from itertools import pairwise
from typing import Any

from .host_internals import regex_parser as parser
from .validation import MAX_ITEMS

MAX_LENGTH = 10_000
MAX_WAYS = 10**6
# How many lengths a repetition can have in the name of a module. Only a few of them go on where one
# of a few letters must come next, since no letter is in a name very often.
LENGTHS = 100
ANCHORED_LENGTHS = 10
FEW_LETTERS = 10

_REPEATS = (parser.MAX_REPEAT, parser.MIN_REPEAT, parser.POSSESSIVE_REPEAT)


def check_regex(name: str, value: str) -> None:
    """Raise ValueError unless `value` is a regular expression that is matched in reasonable time.

    `re` tries one way after the other to divide a text among a pattern's repetitions and
    alternatives. Their number is at most a product over the parts of the pattern, and a
    repetition of something that has several ways itself has exponentially many: (a+)+ or (a|a)*.
    """
    if not value:
        raise ValueError(
            f"{name} is empty: give module names, a regex, 'all-linear', or None for the default."
        )
    if plain_names(value):
        return
    if len(value) > MAX_LENGTH:
        raise ValueError(
            f"{name} has {len(value)} letters; expected at most {MAX_LENGTH}: list the names."
        )
    try:
        re.compile(value)
        ways = _ways(parser.parse(value), anchored=True)
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(
            f"{name}={value[:200]!r} is not a valid regular expression ({error}); for one module "
            "name, write a list."
        ) from error
    if ways > MAX_WAYS:
        raise ValueError(
            f"{name}={value[:200]!r} could be matched in too many ways, which takes too long: "
            "leave out repetitions inside of repetitions (write .* for them), or list the names."
        )


def plain_names(pattern: str) -> frozenset[str]:
    """The names that an alternation of `re.escape`d names matches; none for any other pattern.

    Such a pattern is matched in linear time, however long it is.
    """
    names = [re.sub(r"\\(.)", r"\1", escaped) for escaped in pattern.split("|", MAX_ITEMS)]
    are_names = all(0 < len(name) <= MAX_LENGTH for name in names)
    is_plain = are_names and "|".join(map(re.escape, names)) == pattern
    return frozenset(names if is_plain else [])


def _ways(pattern: Any, anchored: bool = False) -> float:
    """An upper bound for the ways in which a parsed pattern matches from one position.

    anchored: what comes after the pattern decides where it ends.
    """
    ways = 1.0
    items = list(pattern)
    for (kind, argument), after in zip(items, [*items[1:], None]):
        ends_surely = anchored if after is None else _letters(*after) <= FEW_LETTERS
        # No number in here is large enough to become infinite.
        ways = min(ways * _ways_of(kind, argument, ends_surely), MAX_WAYS + 1.0)
    return ways


def _ways_of(kind: Any, argument: Any, anchored: bool) -> float:
    """As `_ways`, for one item."""
    if kind in _REPEATS:
        low, high, body = argument
        once = _ways(body)
        if once == 1:
            return min(high - low + 1, ANCHORED_LENGTHS if anchored else LENGTHS)
        # 2 ** 20 is more than MAX_WAYS.
        return sum(once**count for count in range(min(low, 20), min(high, 20) + 1))
    if kind is parser.BRANCH and _exclude_each_other(argument[1]):
        return 1.0
    return max(1.0, sum(_ways(part, anchored) for part in _inside(argument)))


def _inside(argument: Any) -> list[Any]:
    """The patterns inside an item: alternatives, or what a group or a lookahead holds."""
    if isinstance(argument, parser.SubPattern):
        return [argument]
    parts = argument if isinstance(argument, (tuple, list)) else []
    return [pattern for part in parts for pattern in _inside(part)]


def _exclude_each_other(alternatives: list[Any]) -> bool:
    """Whether all are plain texts, of which none begins another, also where case is ignored."""
    if any(kind is not parser.LITERAL for text in alternatives for kind, _ in text):
        return False
    texts = sorted("".join(chr(letter) for _, letter in text).casefold() for text in alternatives)
    return not any(after.startswith(before) for before, after in pairwise(texts))


def _letters(kind: Any, argument: Any) -> float:
    """How many letters an item can begin with."""
    if kind is parser.LITERAL:
        return 1
    if kind is parser.RANGE:
        return argument[1] - argument[0] + 1
    if kind is parser.CATEGORY and argument is parser.CATEGORY_DIGIT:
        return FEW_LETTERS
    if kind is parser.IN:
        return sum(_letters(*part) for part in argument)
    if kind in (parser.SUBPATTERN, parser.BRANCH):
        return max(_letters(*part[0]) if len(part) else math.inf for part in _inside(argument))
    return math.inf
