"""The net under the redesign: record what tiny mixtures compute, and compare bit for bit.

PYTHONPATH=$TREE:$TREE/kernels:$TREE/tests python tests/net record OUT.pt
PYTHONPATH=$TREE:$TREE/kernels:$TREE/tests python tests/net compare OUT.pt [--only TEXT]
"""

from __future__ import annotations

import argparse
import os
import sys
import time
import traceback
import warnings
from collections.abc import Iterator
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import transformers
from cases import grid, others, run_case
from recorder import Recorded
from torch import Tensor

import moelora


def run(only: str) -> Iterator[tuple[str, Recorded]]:
    """Every case whose name contains `only`, and what it computed; an error is recorded too."""
    for name, settings in [*grid(), *others()]:
        if only not in name:
            continue
        try:
            recorded = run_case(settings)
        except Exception:
            recorded = {"error": traceback.format_exc()}
        yield name, recorded


def difference(before: Any, after: Any) -> str | None:
    """How two recorded values differ, or None where they are the same bits."""
    if not isinstance(before, Tensor) or not isinstance(after, Tensor):
        return None if before is after or before == after else f"{before!r} → {after!r}"
    if before.shape != after.shape or before.dtype != after.dtype:
        shapes = [f"{list(t.shape)} {t.dtype}" for t in (before, after)]
        return " → ".join(shapes)
    same = (before == after) | (
        before.isnan() & after.isnan() if before.is_floating_point() else False
    )
    if bool(same.all()):
        return None
    distance = (before.double() - after.double()).abs()
    return f"max |Δ| = {float(distance[~same].max()):.3g} of {float(before.abs().max()):.3g}"


def compare(name: str, before: Recorded, after: Recorded, shown: int) -> int:
    """Print the first differences of one case; returns how many there are."""
    if "error" in after and "error" not in before:
        print(f"✗ {name}: ERROR\n{after['error']}")
        return 1
    differences = {}
    for key in [*before, *(k for k in after if k not in before)]:
        if key not in after or key not in before:
            differences[key] = "not recorded " + ("now" if key not in after else "before")
        elif what := difference(before[key], after[key]):
            differences[key] = what
    if differences:
        print(f"✗ {name}: {len(differences)} of {len(before)} quantities differ")
    for key, what in list(differences.items())[:shown]:
        print(f"    {key}: {what}")
    return len(differences)


def main() -> int:
    """Record or compare; the exit status is 1 where anything differs or a recorded case failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("action", choices=("record", "compare"))
    parser.add_argument("file")
    parser.add_argument("--only", default="", help="only cases whose name contains this")
    parser.add_argument("--shown", type=int, default=6, help="differences printed of each case")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    print(f"moelora of {moelora.__file__}")
    began = time.time()
    if chosen.action == "record":
        recorded = dict(run(chosen.only))
        failed = {name: case["error"] for name, case in recorded.items() if "error" in case}
        for name, error in failed.items():
            print(f"✗ {name}: ERROR\n{error}")
        torch.save(recorded, chosen.file)
        print(f"{len(recorded)} cases, {len(failed)} failed, {time.time() - began:.0f} s")
        return int(bool(failed))
    before = torch.load(chosen.file, weights_only=True)
    wrong = cases = 0
    for name, case in run(chosen.only):
        cases += 1
        wrong += bool(compare(name, before[name], case, chosen.shown))
    print(f"{cases} cases, {wrong} differ, {time.time() - began:.0f} s")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
