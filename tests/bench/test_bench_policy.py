"""The bench's whole path with small models on the CPU: which side is faster, not by how much."""

import json
import subprocess
import sys

import pytest


@pytest.mark.slow
def test_tiny_bench_points_the_right_way(tmp_path):
    out = tmp_path / "policy.json"
    command = [sys.executable, "-m", "tests.bench.bench_policy", "--tiny", "--out", str(out)]
    subprocess.run(command, check=True, timeout=110)
    figures = json.loads(out.read_text())["figures"]
    assert figures["parity_full_size_rel_error"]["ours"] < 1e-5
    for name in ("chunk_b1_ms", "chunk_b64_ms", "ppo_update_b32_ms", "sft_update_samples_per_s"):
        assert figures[name]["ratio"] > 1.0, name
