"""What tests that start processes have in common."""

from __future__ import annotations

import os
import socket
import sys
from typing import NoReturn


def free_port() -> int:
    """A port of this machine on which nothing listens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def end_process() -> NoReturn:
    """End this process, which took part in a gloo group, without finalizing Python.

    A thread of gloo that lets go of a collective's tensors while the interpreter ends aborts the
    process with "terminate called without an active exception": pytorch/pytorch #179291, #190489.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
