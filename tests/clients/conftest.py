"""What the tests with other people's programs share; they run in an environment of their own."""

from __future__ import annotations

import importlib.util

# `make test-clients` installs them; `make test` runs without.
CLIENTS = {"test_trl": "trl", "test_trl_preferences": "trl", "test_programs": "lm_eval"}
CLIENTS |= {"test_engines": "deepspeed", "test_quantised": "bitsandbytes"}
collect_ignore = [
    f"{test}.py" for test, client in CLIENTS.items() if importlib.util.find_spec(client) is None
]
