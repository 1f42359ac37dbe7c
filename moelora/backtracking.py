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
# How many lengths a repetition can have in the name of a module. Only a few of them go on where a
# certain letter must come next, since no letter is in a name very often.
LENGTHS = 100
ANCHORED_LENGTHS = 10
# How many letters an item may stand for and still count as certain.
FEW_LETTERS = 10

_REPEATS = (parser.MAX_REPEAT, parser.MIN_REPEAT, parser.POSSESSIVE_REPEAT)


def check_regex(name: str, value: str) -> None:
    """Raise ValueError unless `value` is a regular expression that is matched in reasonable time.

    `re` tries one way after the other to divide a text among a pattern's repetitions and
    alternatives. Their number is at most a product over the parts of the pattern, and a
    repetition of something that has several ways itself has exponentially many: (a+)+ or (a|a)*.

    Args:
        name: the argument, for errors.
        value: the pattern.
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
        ways = _ways(list(parser.parse(value)), anchored=True)
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
    """The names that `pattern` matches, where it is an alternation of `re.escape`d names alone.

    Such a pattern is matched in linear time, however long it is.

    Args:
        pattern: a regular expression.

    Returns:
        The names; none where the pattern is anything else.
    """
    names = set()
    for escaped in pattern.split("|", MAX_ITEMS):
        name = re.sub(r"\\(.)", r"\1", escaped)
        if not 0 < len(name) <= MAX_LENGTH or re.escape(name) != escaped:
            return frozenset()
        names.add(name)
    return frozenset(names)


def _ways(items: list[tuple[Any, Any]], anchored: bool = False) -> float:
    """An upper bound for the ways in which a sequence of parsed items matches from one position.

    anchored: what comes after the sequence decides where it ends.
    """
    ways = 1.0
    for i, (kind, argument) in enumerate(items):
        is_last = i + 1 == len(items)
        ways *= _ways_of(kind, argument, anchored if is_last else _is_anchor(*items[i + 1]))
        # No number in here is large enough to become infinite.
        ways = min(ways, MAX_WAYS + 1.0)
    return ways


def _ways_of(kind: Any, argument: Any, anchored: bool) -> float:
    """As `_ways`, for one item."""
    if kind in _REPEATS:
        low, high, body = argument
        once = _ways(list(body))
        if once == 1:
            return min(high - low + 1, ANCHORED_LENGTHS if anchored else LENGTHS)
        # 2 ** 20 is more than MAX_WAYS.
        return sum(once**count for count in range(min(low, 20), min(high, 20) + 1))
    if kind is parser.BRANCH and _exclude_each_other(argument[1]):
        return 1.0
    return max(1.0, sum(_ways(list(part), anchored) for part in _inside(kind, argument)))


def _inside(kind: Any, argument: Any) -> list[Any]:
    """The patterns inside an item: alternatives, or what a group or a lookahead holds."""
    parts = argument[1] if kind is parser.BRANCH else argument
    parts = parts if isinstance(parts, (tuple, list)) else [parts]
    return [part for part in parts if isinstance(part, parser.SubPattern)]


def _exclude_each_other(alternatives: list[Any]) -> bool:
    """Whether all are plain texts, of which none begins another, also where case is ignored."""
    texts = []
    for alternative in alternatives:
        if any(kind is not parser.LITERAL for kind, _ in alternative):
            return False
        texts.append("".join(chr(letter) for _, letter in alternative).casefold())
    texts.sort()
    return not any(after.startswith(before) for before, after in pairwise(texts))


def _is_anchor(kind: Any, argument: Any) -> bool:
    """Whether an item begins with one of a few certain letters."""
    if kind is parser.LITERAL:
        return True
    if kind is parser.IN:
        return sum(_letters(*part) for part in argument) <= FEW_LETTERS
    if kind is parser.SUBPATTERN or kind is parser.BRANCH:
        inside = _inside(kind, argument)
        return all(len(part) and _is_anchor(*part[0]) for part in inside)
    return False


def _letters(kind: Any, argument: Any) -> float:
    """How many letters a part of a set such as [a-f_] stands for."""
    if kind is parser.RANGE:
        return argument[1] - argument[0] + 1
    if kind is parser.CATEGORY:
        return FEW_LETTERS if argument is parser.CATEGORY_DIGIT else math.inf
    return 1 if kind is parser.LITERAL else math.inf
