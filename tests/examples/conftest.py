"""The examples are scripts, not a package: their folder goes on the path, as `python x.py` does."""

import sys
from pathlib import Path

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
sys.path.insert(0, str(EXAMPLES))
