"""What the tests of the engine share; they run in an environment of their own."""

from __future__ import annotations

import importlib.util
import os
from types import SimpleNamespace

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
if not collect_ignore_glob and os.environ.get("VLLM_USE_V2_MODEL_RUNNER") == "1":
    # The V2 runner's own kernels are Triton's, whose interpreter runs them where there is no GPU;
    # Triton asks at its import, and vLLM looks for a driver.
    os.environ["TRITON_INTERPRET"] = "1"
    from triton.backends import backends

    backends["cpu"] = SimpleNamespace(driver=SimpleNamespace(is_active=lambda: False))  # type: ignore[assignment]
