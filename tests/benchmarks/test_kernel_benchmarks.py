"""The kernel benchmark runs from end to end on tiny shapes, names wrong candidates, and computes
the bounds of kernels/README.md.
"""

from __future__ import annotations

import json
import math
from dataclasses import replace
from itertools import product

import pytest
import torch
from moelora_kernels import BACKENDS, PATHS

from benchmarks import bench_kernels
from benchmarks.kernels import measures as kernel_measures
from benchmarks.kernels import plot as kernel_plot
from benchmarks.kernels.bounds import KNOWN_PEAKS, added_backward, added_forward, base_pass
from benchmarks.kernels.candidates import candidates, make_inputs, on_a_gpu
from benchmarks.kernels.cases import CUDA, QUICK, SQUARE, TINY, Case
from benchmarks.kernels.check import Specification, WrongResult
from benchmarks.kernels.measures import MODES
from benchmarks.kernels.names import FROZEN, LORA, ours
from benchmarks.kernels.part import read, write
from benchmarks.kernels.run import DeviceLost, Run
from benchmarks.kernels.targets import Target, gpu_targets, summary
from benchmarks.kernels.timing import timed

H200 = KNOWN_PEAKS["NVIDIA H200"]
CPU_DEVICE = torch.device("cpu")


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kernels")
    bench_kernels.main(["--quick", "--out", str(folder)])
    return folder, json.loads((folder / "kernels_cpu.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode.name)
def test_every_candidate_has_a_row_or_a_reason(result, mode):
    for case in QUICK.cases:
        rows = [r for r in result[1]["rows"] if (r["case"], r["measure"]) == (case.name, mode.name)]
        assert sorted(r["candidate"] for r in rows) == sorted(c.name for c in candidates())
        reasons = {r["candidate"]: r["not run"] for r in rows if "not run" in r}
        assert all("GPU" in reason or "fp32" in reason for reason in reasons.values())
        assert set(reasons) == {c.name for c in candidates() if c.backend == "triton" or c.fp32}


def test_figures_are_sensible(result):
    timed = [row for row in result[1]["rows"] if "over frozen linear" in row]
    assert {"forward", "decode", "scaling experts"} <= {row["measure"] for row in timed}
    for row in timed:
        figures = [value for value in row.values() if isinstance(value, float)]
        assert all(math.isfinite(figure) and figure > 0 for figure in figures), row
        assert row.get("share of bound", 0.5) <= 2
        assert row["microseconds min"] <= row["microseconds"]


def test_ours_names_the_path_that_it_takes(result):
    rows = [
        row for row in result[1]["rows"] if row.get("candidate") == ours("eager") and "path" in row
    ]
    assert {row["path"] for row in rows if row["measure"] == "forward"} == {"dense", "sequence"}


def test_the_summary_has_every_target(result):
    lines = result[1]["summary"]
    assert [line["target"] for line in lines] == ["≥ 3.0", "≤ 1.3", "≤ 1.5"] * 2
    assert all(
        line["met"] in (True, False) and line["min"] <= line["value"] <= line["max"]
        for line in lines
    )


def test_the_figure_is_there(result):
    assert (result[0] / "kernels_scaling_cpu.png").stat().st_size > 10_000


def test_without_matplotlib_a_line_says_so(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    line = kernel_plot.plot([], QUICK, tmp_path / "a.png")
    assert "matplotlib is not installed" in line and not (tmp_path / "a.png").exists()


def test_some_measures_alone(tmp_path):
    bench_kernels.main(["--quick", "--only", "growth", "--out", str(tmp_path)])
    rows = json.loads((tmp_path / "kernels_cpu.json").read_text(encoding="utf-8"))["rows"]
    assert {row["measure"].partition(",")[0] for row in rows} == {"growth"}
    with pytest.raises(SystemExit):
        bench_kernels.main(["--only", "speed"])


@pytest.mark.parametrize("factor", [0.98, math.nan])
def test_a_wrong_candidate_raises(factor):
    inputs = make_inputs(TINY, CPU_DEVICE, torch.float32)
    right = next(c for c in candidates() if c.name == ours("eager"))
    wrong = replace(right, add=lambda i, y: right.add(replace(i, weights=i.weights * factor), y))
    Specification(inputs).check(right)
    with pytest.raises(WrongResult, match="y is off"):
        Specification(inputs).check(wrong)


@pytest.mark.parametrize(
    "case",
    [
        # ranks that grouped_mm's strides do not allow; more experts than are checked at once;
        # shared routing rows
        replace(TINY, rank=12),
        replace(TINY, experts=40, rank=2, top_k=4),
        replace(TINY, tokens=512, tokens_per_row=64),
    ],
    ids=lambda case: case.name,
)
def test_every_mixture_candidate_is_one(case):
    specification = Specification(make_inputs(case, CPU_DEVICE, torch.float32))
    for candidate in candidates():
        if candidate.kind == "mixture" and candidate.why_not(specification.inputs, 2**30) is None:
            specification.check(candidate)


def test_what_needs_more_memory_than_there_is_says_so():
    inputs = make_inputs(TINY, CPU_DEVICE, torch.float32)
    reasons = {c.name: c.why_not(inputs, 1000.0) for c in candidates()}
    assert "GiB" in (reasons["pair rows with reduce"] or "") and reasons[LORA] is None


def test_every_backend_and_path_is_a_candidate():
    kinds = product((b for b in BACKENDS if b != "reference"), (None, *PATHS), (False, True))
    assert {ours(*kind) for kind in kinds} == {c.name for c in candidates() if c.backend}


# The columns of the table in kernels/README.md: frozen base, ideal, all experts; microseconds.
@pytest.mark.parametrize(
    ("case", "wanted"),
    [
        (replace(SQUARE, tokens=1), (7.8, 0.1, 0.5)),
        (Case(64, 4096, 4096, 64, 64), (8.0, 13.9, 16.0)),
        (SQUARE, (348, 47, 47)),
        (replace(SQUARE, rank=64), (348, 49, 87)),
        (Case(8192, 14336, 4096, 8, 16), (1218, 87, 87)),
    ],
    ids=lambda value: value.name if isinstance(value, Case) else "",
)
def test_the_forward_bound_is_that_of_the_table(case, wanted):
    works = (base_pass(case, 2), added_forward(case, 2), added_forward(case, 2, dense=True))
    assert [1e6 * work.seconds(H200) for work in works] == pytest.approx(
        wanted, rel=0.007, abs=0.05
    )


def test_the_backward_bound_is_near_the_table():
    # 83 and 182 there count the traffic of h too.
    microseconds = [
        1e6 * added_backward(c, 2, dense=True).seconds(H200)
        for c in (SQUARE, replace(SQUARE, rank=64))
    ]
    assert microseconds == pytest.approx([83, 182], rel=0.06)
    alone = added_backward(SQUARE, 2, with_base=False).seconds(H200)
    assert alone < added_backward(SQUARE, 2).seconds(H200)


def test_a_target_reads_its_row():
    row = {
        "measure": "m",
        "candidate": "peer",
        "over ours": 4.0,
        "over ours min": 2.0,
        "over ours max": 5.0,
    }
    inverse = Target("a", "m", "peer", "over ours", 0.3, inverse=True).judged([row])
    assert (inverse["value"], inverse["min"], inverse["max"], inverse["met"]) == (
        0.25,
        0.2,
        0.5,
        True,
    )
    assert Target("a", "m", "peer", "over ours", 5.0, at_least=True).judged([row])["met"] is False
    assert Target("a", "m", FROZEN, "over ours", 5.0).judged([row])["met"] is None


def test_a_target_without_a_figure_says_why():
    target = Target("a", "m", "peer", "over ours", 5.0, case="c")
    assert target.judged([])["why"] == "not measured"
    row = {"case": "c", "measure": "m", "candidate": "peer", "failed": "died: SIGSEGV"}
    assert target.judged([row])["why"] == "died: SIGSEGV"


def test_what_only_a_gpu_measures_holds_together_without_one(monkeypatch):
    """The graphs and the memory counter taken out, the rest runs as it will there."""
    run = Run(QUICK, CPU_DEVICE)
    monkeypatch.setattr(Run, "is_gpu", True)
    monkeypatch.setattr(Run, "free_bytes", lambda self: 2**30)
    monkeypatch.setattr(Run, "captured", lambda self, call: call)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: None)
    monkeypatch.setattr(kernel_measures, "peak_bytes", lambda call: bool(call()) * 2**20)
    monkeypatch.setattr(kernel_measures, "_copies", lambda run, inputs: 2)
    units = [*kernel_measures.memory(run), *kernel_measures.decode(run)]
    rows = [row for _, found in units for row in found()]
    loop = [
        row
        for row in rows
        if row.get("candidate") == "loop over experts" and row["measure"] == "decode"
    ]
    assert loop and all("graph" in row["not run"] for row in loop)
    assert {row["measure"] for row in rows} == {"memory", "decode", "decode, eager"}
    held = [row["ratio"] for row in rows if row["measure"] == "memory" and "ratio" in row]
    assert held and all(ratio > 0 for ratio in held)


def test_a_candidate_that_fails_is_left_out_and_the_others_are_timed():
    run = Run(QUICK, CPU_DEVICE, avoid={"dies"})

    def fails():
        raise RuntimeError("out of memory\nand more")

    timings = run.timed({"well": lambda: 1, "fails": fails, "dies": lambda: 1})
    assert list(timings.seconds) == ["well"]
    assert timings.failed["fails"] == "RuntimeError: out of memory"
    assert "ended the process" in timings.failed["dies"]
    assert list(timed({"a": lambda: 1}, CPU_DEVICE, 2).seconds) == ["a"]


def test_a_device_that_answers_no_more_ends_the_process(monkeypatch):
    def lost(device=None):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(Run, "is_gpu", True)
    monkeypatch.setattr(torch.cuda, "synchronize", lost)
    with pytest.raises(DeviceLost, match="illegal memory access"):
        Run(QUICK, CPU_DEVICE).attempt("ours", lambda: 1)


def test_a_part_file_says_what_is_done_and_what_to_avoid(tmp_path):
    path = tmp_path / "part.jsonl"
    assert read(path).rows == []
    for line in (
        {"begin": "a"},
        {"row": {"x": 1}},
        {"end": "a"},
        {"begin": "b"},
        {"doing": "peer"},
    ):
        write(path, line)
    assert read(path).current == ("b", "peer")
    write(path, {"died": "b", "candidate": "peer"})
    with path.open("a", encoding="utf-8") as file:
        file.write('{"row": {"cut of')
    record = read(path)
    assert record.rows == [{"x": 1}] and record.current is None
    # Begun again without the candidate; what dies of nothing that has a name is not.
    assert record.over == {"a"} and record.avoid == {"b": {"peer"}}
    path.write_text('{"begin": "c"}\n{"died": "c", "candidate": ""}\n')
    assert read(path).over == {"c"}


def test_the_gpu_targets_are_those_of_the_table():
    limits = [target.limit for target in gpu_targets(CUDA)]
    assert {1.18, 1.28, 1.45, 1.15, 5.0, 1.5, 2.0, 1.10, 0.75, 0.60} == set(limits)
    assert len(summary(CUDA, [])) == len(limits)


def test_the_gpu_measures_what_models_run():
    names = {candidate.name for candidate in on_a_gpu()}
    assert {ours("triton", fp32=True), ours("triton"), ours("eager", "dense"), FROZEN} <= names
    middle = [c for c in CUDA.cases if 128 < c.experts * c.rank <= 380]
    assert {(c.experts, c.rank) for c in middle} == {(8, 32), (16, 16)}
    assert any(case.tokens == 1 for case in CUDA.cases)
