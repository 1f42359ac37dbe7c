"""What the tests of the engine share; they run in an environment of their own."""

from __future__ import annotations

import importlib.util
import os

# Before vLLM is imported: one process, one thread, no binding to cores.
os.environ |= {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
}
# `make test-vllm` installs it; `make test` runs without.
collect_ignore_glob = [] if importlib.util.find_spec("vllm") else ["test_*.py"]
