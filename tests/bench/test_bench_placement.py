"""The bench's whole path with a small model, on the CPU and gloo."""

import json
import os
import subprocess
import sys

import pytest


def run(tmp_path, *parts):
    out = tmp_path / "placement.json"
    command = [sys.executable, "-m", "tests.bench.bench_placement", "--tiny", "--out", str(out), "--only", *parts]
    subprocess.run(command, check=True, timeout=280, env=os.environ | {"OMP_NUM_THREADS": "1"})
    return json.loads(out.read_text())


@pytest.mark.slow
def test_tiny_update_and_weights_that_travel(tmp_path):
    found = run(tmp_path, "update", "disaggregated")
    assert found["figures"]["update_samples_per_s"]["ratio"] > 1.0
    assert found["figures"]["weight_sync_s"]["bytes"] > 0
    assert found["details"]["disaggregated"]["carrier"] == "gloo"
    assert found["details"]["disaggregated"]["ratio_of_first_iteration"] == pytest.approx(1.0, abs=1e-2)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_tiny_placements_all_say_who_was_idle(tmp_path):
    names = ["hybrid", "hybrid_pipelined", "collocated", "disaggregated_asynchronous", "collocated_sharded"]
    names.append("collocated_offload")
    found = run(tmp_path, *names)
    for name in names:
        shares = found["figures"][f"{name}_samples_per_s"]["idle_shares"]
        assert all(0 <= shares[component] <= 1 for component in ("env", "rollout", "actor"))
    assert found["details"]["disaggregated_asynchronous"]["rollout/staleness"] > 0
    assert found["details"]["collocated"]["weights_sent_bytes"] == 0  # one copy on each device
