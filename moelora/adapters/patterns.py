"""Regular expressions of a file that nobody vouches for, matched as PEFT matches them, but never
for long.
"""

from __future__ import annotations

import functools
import re
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import regex

from ..backtracking import plain_names

# Compiling cannot be interrupted; this much compiles within a second.
MAX_LENGTH = 2**16
# Matching all patterns of an adapter with all its linears: a part for each linear, since honest
# adapters with a pattern for each linear take longer the larger they are.
SECONDS = 0.5
SECONDS_PER_LINEAR = 0.002


class Patterns:
    """The patterns of one adapter_config.json; all matching together has one limit of time.

    `re`, which PEFT uses, cannot be interrupted, and a pattern such as `(a|a)*b` would hold it for
    years. `regex` reads the same patterns and takes a timeout.
    """

    def __init__(self, num_linears: int):
        self.seconds = SECONDS + SECONDS_PER_LINEAR * num_linears
        self._left = self.seconds
        self._length = 0
        self._compiled = functools.cache(self._compile)
        # Whether a pattern of PEFT's is the whole name of one linear.
        self._is_one_name = functools.cache(lambda p: p[:1] == "^" and len(plain_names(p[1:])) == 1)

    def matches(self, pattern: str, name: str) -> bool:
        """Whether `pattern` matches the whole of `name`; ValueError where it cannot be told."""
        with self._in_time(pattern):
            compiled = self._compiled(pattern)
            if isinstance(compiled, frozenset):
                return name in compiled
            return compiled.fullmatch(name, timeout=self._left) is not None

    def first(self, patterns: Iterable[str], linear: str) -> str | None:
        """The first of PEFT's `rank_pattern` or `alpha_pattern` keys that matches the end of a
        linear's name, or None.
        """
        # As `export_expert` writes them: one for each linear, by its whole name.
        own = "^" + re.escape(linear)
        with self._in_time(own):
            candidates = [p for p in patterns if p == own or not self._is_one_name(p)]
        for pattern in candidates:
            if pattern == own or self.matches(rf"(.*\.)?({pattern})$", linear):
                return pattern
        return None

    @contextmanager
    def _in_time(self, pattern: str) -> Iterator[None]:
        start = time.thread_time()
        try:
            if self._left <= 0:
                raise TimeoutError
            yield
        except TimeoutError:
            self._left = 0.0
            raise ValueError(
                f"its patterns take more than {self.seconds:.1f} seconds to match, as "
                f"{pattern[:60]!r} does: name the modules instead"
            ) from None
        finally:
            self._left -= time.thread_time() - start

    def _compile(self, pattern: str) -> regex.Pattern | frozenset[str]:
        """A pattern, or the names that it lists, however many."""
        names = plain_names(pattern)
        if names:
            return names
        self._length += len(pattern)
        if self._length > MAX_LENGTH:
            raise ValueError(
                f"its patterns have more than {MAX_LENGTH} letters: name the modules instead"
            )
        try:
            return regex.compile(pattern)
        except (regex.error, RecursionError, OverflowError, MemoryError) as error:
            raise ValueError(
                f"its pattern {pattern[:60]!r} is not a regular expression ({error})"
            ) from error
