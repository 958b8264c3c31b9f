"""The benchmark beside TRL, at toy size: every kind of side runs, and what is reported hangs together."""

import json
import subprocess
import sys

import pytest
from conftest import PROJECT, ROWS, write_rows

pytest.importorskip("trl", reason="TRL is installed for the tests only")


def test_the_benchmark_runs(tmp_path):
    write_rows(tmp_path / "pairs.jsonl", ROWS)
    sides = ("trl_precomputed", "padded_guided", "plain", "guided")
    command = [
        sys.executable,
        str(PROJECT / "tests" / "benchmark" / "benchmark.py"),
        "--shape",
        "tiny",
        "--sides",
        *sides,
    ]
    command += ["--data", str(tmp_path / "pairs.jsonl"), "--json", str(tmp_path / "result.json")]
    command += ["--pairs", "2", "--rounds", "2", "--repeats", "1", "--max_length", "100"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads((tmp_path / "result.json").read_text())
    for side in sides:
        assert len(result[side]["seconds"]) == 2 and result[side]["pairs_per_second"] > 0
        assert 2**27 < result[side]["peak_memory_bytes"] < 2**35
    assert 0 < result["limit_share"] < 1 < result["flops_per_second"]
    ratio = result["guided"]["peak_memory_bytes"] / result["padded_guided"]["peak_memory_bytes"]
    assert "guided : padded_guided = " in done.stdout and f"{ratio:.2f} × the peak memory" in done.stdout
