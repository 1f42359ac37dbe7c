"""Regular expressions of a file that nobody vouches for, matched as PEFT matches them, but never
for long.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Iterable

import regex

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
        self._spent = 0.0
        self._length = 0
        self._compiled = functools.cache(self._compile)

    def matches(self, pattern: str, name: str) -> bool:
        """Whether `pattern` matches the whole of `name`.

        Raises:
            ValueError: it is not a regular expression, or the patterns are too long or too slow.
        """
        start = time.thread_time()
        try:
            left = self.seconds - self._spent
            matched = left > 0 and self._compiled(pattern).fullmatch(name, timeout=left)
        except TimeoutError:
            left = 0.0
        self._spent += time.thread_time() - start
        if left <= 0:
            self._spent = self.seconds
            raise ValueError(
                f"its patterns take more than {self.seconds:.1f} seconds to match, as "
                f"{pattern[:60]!r} does: name the modules instead"
            )
        return bool(matched)

    def first(self, patterns: Iterable[str], linear: str) -> str | None:
        """The first of PEFT's `rank_pattern` or `alpha_pattern` keys that matches the end of a
        linear's name, or None.
        """
        return next((p for p in patterns if self.matches(rf"(.*\.)?({p})$", linear)), None)

    def _compile(self, pattern: str) -> regex.Pattern:
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
