"""The bench's whole path with small models on the CPU: which side is faster, not by how much."""

import json
import os
import subprocess
import sys

import pytest


@pytest.mark.slow
def test_tiny_bench_points_the_right_way(tmp_path):
    out = tmp_path / "policy.json"
    command = [sys.executable, "-m", "tests.bench.bench_policy", "--tiny", "--out", str(out)]
    subprocess.run(command, check=True, timeout=280, env=os.environ | {"OMP_NUM_THREADS": "1"})
    found = json.loads(out.read_text())
    figures = found["figures"]
    assert figures["parity_full_size_rel_error"]["ours"] < 1e-5
    for name in ("chunk_b1_ms", "chunk_b64_ms", "ppo_update_b32_ms", "sft_update_samples_per_s"):
        assert figures[name]["ratio"] > 1.0, name
    for name in ("single", "joint"):
        assert max(found["details"][f"kept_to_recomputed_prefix_{name}"].values()) < 1e-5
