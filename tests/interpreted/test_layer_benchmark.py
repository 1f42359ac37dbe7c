"""The benchmark of a whole layer's decoding, with the router inside the kernels, under the
interpreter.
"""

from __future__ import annotations

import torch
from benchmarks.kernels.layer import ROUTED, layer_decode

from benchmarks.kernels.bounds import Peaks
from benchmarks.kernels.cases import suite_for
from benchmarks.kernels.measures import Run


def test_both_ways_to_decode_are_right_and_timed() -> None:
    suite = suite_for("cpu", quick=True)
    rows = layer_decode(Run(suite, torch.device("cpu"), Peaks(1e10, 1e10), "ours eager"))
    names = {row["candidate"] for row in rows}
    assert {"frozen linear", "ours eager", "ours triton", ROUTED} == names
    assert all(row["over frozen linear"] > 0 for row in rows)
