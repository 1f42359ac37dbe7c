"""Private names of other packages that moelora needs, each with the reason."""

import re
from typing import Any

# Regular expressions (moelora/backtracking.py). The standard library's parser has had no public
# name since 3.11, and only the parsed form shows repetitions inside of repetitions.
regex_parser: Any = re._parser  # type: ignore[attr-defined]
