"""What all tests share: one thread, no network, quiet libraries, the same seed."""

from __future__ import annotations

import os

# Before transformers is imported: nothing may be looked up on a hub.
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
import transformers

torch.set_num_threads(1)

# A process either interprets Triton's kernels or compiles them: `make test` runs those tests in one
# of their own.
collect_ignore = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["interpreted"]
transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()


def pytest_report_header() -> str:
    """Rounding differs between them, and with it where training goes."""
    capability = torch.backends.cpu.get_cpu_capability()
    return f"torch computes on the CPU with {capability} (ATEN_CPU_CAPABILITY chooses)"


@pytest.fixture(autouse=True)
def seeded() -> None:
    transformers.set_seed(0)
