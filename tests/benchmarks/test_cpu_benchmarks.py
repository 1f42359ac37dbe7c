"""Both CPU benchmarks run from end to end on a tiny base, and write what they print."""

from __future__ import annotations

import json

import pytest

from benchmarks import (
    bench_compile,
    bench_distributed,
    bench_generation,
    bench_many_experts,
    bench_routers,
    bench_training,
)
from benchmarks.harness import Timings, in_turns, table
from moelora import ROUTERS


def test_training(tmp_path, capsys):
    words = "--base tiny --layers 1 --batch 2 --length 8 --rounds 2 --memory-rounds 1 --output"
    bench_training.main([*words.split(), str(tmp_path)])
    result = json.loads((tmp_path / "training_cpu.json").read_text(encoding="utf-8"))
    assert {"machine", "settings", "rows"} <= set(result)
    assert {"processor", "threads", "versions", "commit"} <= set(result["machine"])
    targets = [row["target"] for row in result["rows"] if "target" in row]
    assert targets == [1.20, 1.30, 1.15, 1.15]
    assert all(row["ratio"] > 0 for row in result["rows"] if "target" in row)
    assert "| time: mixture E=64" in capsys.readouterr().out


def test_generation(tmp_path):
    words = "--base tiny --layers 1 --prompt 4 --new-tokens 4 --rounds 2 --output"
    bench_generation.main([*words.split(), str(tmp_path)])
    rows = json.loads((tmp_path / "generation_cpu.json").read_text(encoding="utf-8"))["rows"]
    assert [(row["batch"], row["target"]) for row in rows if "target" in row] == [
        (1, 0.75),
        (8, 0.85),
    ]
    assert "X-LoRA" in rows[-1]["what"] and rows[-1]["tokens/s"] > 0


def test_routers(tmp_path):
    words = "--base tiny --layers 1 --batch 2 --length 8 --rounds 1 --clock cpu --output"
    bench_routers.main([*words.split(), str(tmp_path)])
    rows = json.loads((tmp_path / "routers_cpu.json").read_text(encoding="utf-8"))["rows"]
    assert {row["what"].split()[0] for row in rows} == set(ROUTERS) - {"top_k"}
    assert all(row["ratio"] > 0 and row["target"] == 1.10 for row in rows)


def test_ratios_are_taken_round_by_round():
    timings = Timings({"a": [1.0, 4.0, 9.0], "b": [1.0, 2.0, 3.0]})
    assert timings.ratio("a", "b") == (2.0, 1.0, 3.0)


def test_candidates_take_turns():
    order = []
    in_turns({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, rounds=2, warmup=1)
    assert order == ["a", "b"] * 3


def test_an_unknown_base_is_an_error():
    with pytest.raises(ValueError, match="expected smollm2 or tiny"):
        bench_training.main(["--base", "large"])


def test_tables_take_rows_of_different_columns():
    assert table([{"a": 1}, {"b": 0.123456}]).splitlines()[2:] == ["| 1 |  |", "|  | 0.123 |"]


def test_distributed(tmp_path):
    words = "--base tiny --layers 1 --memory-layers 1 --batch 2 --length 8 --rounds 2 --output"
    bench_distributed.main([*words.split(), str(tmp_path)])
    rows = json.loads((tmp_path / "distributed_cpu.json").read_text(encoding="utf-8"))["rows"]
    assert [row["target"] for row in rows if "target" in row] == [0.75, 0.6]
    assert all(row.get("ratio", 1) > 0 and row.get("MiB", 1) > 0 for row in rows)


def test_compile(tmp_path):
    words = "--base tiny --layers 1 --batch 1 --length 8 --rounds 1 --backend eager"
    bench_compile.main([*words.split(), "--only", "evaluation", "--output", str(tmp_path)])
    rows = json.loads((tmp_path / "compile_cpu.json").read_text(encoding="utf-8"))["rows"]
    assert [row["graph breaks"] for row in rows if row["case"] == "generate"] == [0, 0]
    assert all(row["compiled / eager"] > 0 for row in rows if row["case"] == "evaluation")


def test_many_experts(tmp_path):
    words = "--base tiny --layers 1 --batch 2 --length 8 --experts 20 --output"
    bench_many_experts.main([*words.split(), str(tmp_path)])
    rows = json.loads((tmp_path / "many_experts_cpu.json").read_text(encoding="utf-8"))["rows"]
    assert [row["experts"] for row in rows] == [20]
    # As many as there are, where there are fewer than are asked for.
    assert rows[0]["resident"] == 20
    assert all(value > 0 for name, value in rows[0].items() if name.endswith(" s"))
