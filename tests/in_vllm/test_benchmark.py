"""The benchmark of throughput measures every candidate, of a tiny base."""

from __future__ import annotations

import json

from vllm.distributed import cleanup_dist_env_and_memory

from benchmarks import bench_vllm


def test_every_candidate_is_measured(tmp_path, capsys):
    words = "--base tiny --layers 1 --batch 2 --prompt 32 --new-tokens 8 --rounds 1 --clock cpu"
    try:
        bench_vllm.main([*words.split(), "--output", str(tmp_path)])
    finally:
        cleanup_dist_env_and_memory()
    result = json.loads((tmp_path / "vllm_cpu.json").read_text(encoding="utf-8"))
    rows = result["rows"]
    kinds = [(row["what"], row["candidate"]) for row in rows]
    names = [candidate.name for candidate in bench_vllm.CANDIDATES]
    assert kinds == [(what, name) for what in bench_vllm.TARGETS for name in names]
    assert all(row["tokens/s"] > 0 and row["share of base"] > 0 for row in rows)
    assert [row["target"] for row in rows if "target" in row] == [0.80, 0.75, 0.78]
    assert result["settings"]["vllm"]
    assert "| prefill | mixture E=8" in capsys.readouterr().out
