"""The benchmark beside TRL, at toy size: every kind of side runs, and what is reported hangs together."""

import json
import subprocess
import sys

import pytest
from conftest import PROJECT, ROWS, write_rows

pytest.importorskip("trl", reason="TRL is installed for the tests only")


def run(folder, *flags):
    """What the benchmark printed and wrote, on pairs and a model of toy size."""
    write_rows(folder / "pairs.jsonl", ROWS)
    command = [sys.executable, str(PROJECT / "tests" / "benchmark" / "benchmark.py"), "--shape", "tiny"]
    command += ["--data", str(folder / "pairs.jsonl"), "--json", str(folder / "result.json")]
    command += ["--pairs", "2", "--repeats", "1", "--max_length", "100", *flags]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout, json.loads((folder / "result.json").read_text())


def test_the_benchmark_runs(tmp_path):
    sides = ("trl_precomputed", "padded_guided", "plain", "guided")
    said, result = run(tmp_path, "--rounds", "1", "--together", "--sides", *sides)
    for side in sides:
        assert len(result[side]["seconds"]) == 1 and result[side]["pairs_per_second"] > 0
        assert 2**27 < result[side]["peak_memory_bytes"] < 2**35
    assert 0 < result["limit_share"] < 1 < result["flops_per_second"]
    ratio = result["guided"]["peak_memory_bytes"] / result["padded_guided"]["peak_memory_bytes"]
    assert "guided : padded_guided = " in said and f"{ratio:.2f} × the peak memory" in said


def test_the_passes_alone():
    command = [sys.executable, str(PROJECT / "tests" / "benchmark" / "passes.py"), "--shape", "tiny", "--updates", "1"]
    done = subprocess.run([*command, "--pairs", "1", "2"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.startswith("1 pairs, ") and "\n2 pairs, " in done.stdout and done.stdout.count(" pairs/s") == 2


@pytest.mark.slow
def test_growth(tmp_path):
    said, result = run(tmp_path, "--rounds", "1", "--growth", "vocab_size=60000")
    (measured,) = result["vocab_size"].values()
    for side in ("trl", "guided"):
        memory = measured[side]["peak_memory_bytes"]
        assert f"{memory / 2**20:,.0f} MiB" in said and memory > 2**27 + 4 * 60000 * 64
