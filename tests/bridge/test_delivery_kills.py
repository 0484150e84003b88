"""Checkpoint delivery while both ends are killed with SIGKILL at random points: a verified bundle, or none."""

import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from bridge.checkpoint import bundle_path, bundles, verify_bundle
from tests.bridge.test_checkpoint import bundle

PUBLISHER = """
import sys, time
from pathlib import Path
from bridge.checkpoint_stream import CheckpointPublisher
root, version = Path(sys.argv[3]), int(sys.argv[4])
publisher = CheckpointPublisher(sys.argv[1], sys.argv[2], root, max_bytes_per_s=float(sys.argv[5]))
publisher.announce(version)
publisher.wait_confirmed(version, timeout_s=600)
print("confirmed", flush=True)
publisher.close()
"""
SUBSCRIBER = """
import sys, time
from pathlib import Path
from bridge.checkpoint import verify_bundle
from bridge.checkpoint_stream import CheckpointSubscriber
from tests.bridge.test_checkpoint import EMBODIMENT
subscriber = CheckpointSubscriber(sys.argv[1], sys.argv[2], Path(sys.argv[3]), EMBODIMENT)
while True:
    if (folder := subscriber.poll()) is not None:
        subscriber.confirm(verify_bundle(folder).version)
    time.sleep(0.01)
"""


def deliver_with_kills(tmp_path, kills: int, seed: int, size: int, longest_s: float) -> dict[str, float]:
    """One bundle from one process to another; `kills` random kills of random ends before it may arrive."""
    bundle(tmp_path / "from", 1, size=size)
    total = sum(path.stat().st_size for path in (tmp_path / "from/000001").iterdir())
    rate = total / (kills * longest_s)  # so that no delivery ends before the last kill, were nothing resumed
    ends = [f"ipc://{tmp_path}/announce", f"ipc://{tmp_path}/fetch"]
    commands = {
        "publisher": [sys.executable, "-c", PUBLISHER, *ends, tmp_path / "from", "1", str(rate)],
        "subscriber": [sys.executable, "-c", SUBSCRIBER, *ends, tmp_path / "to"],
    }
    running = {name: subprocess.Popen(command, stdout=subprocess.PIPE) for name, command in commands.items()}
    rng = np.random.default_rng(seed)
    try:
        for _ in range(kills):
            time.sleep(float(rng.uniform(0.4, longest_s)))
            name = str(rng.choice(["publisher", "subscriber"]))
            running[name].send_signal(signal.SIGKILL)
            running[name].wait()
            for folder in bundles(tmp_path / "to").values():
                verify_bundle(folder)  # whole, or not there
            running[name] = subprocess.Popen(commands[name], stdout=subprocess.PIPE)
        assert b"confirmed" in running["publisher"].communicate(timeout=120)[0]
    finally:
        for process in running.values():
            process.kill()
            process.wait()
            process.stdout.close()
    verify_bundle(bundle_path(tmp_path / "to", 1))
    assert not list((tmp_path / "to/.incoming").iterdir())
    return {"kills": kills, "bytes": total}


def test_delivery_survives_kills(tmp_path):
    deliver_with_kills(tmp_path, kills=3, seed=3, size=300_000, longest_s=0.8)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_delivery_survives_twenty_kills(tmp_path):
    deliver_with_kills(tmp_path, kills=20, seed=4, size=2_000_000, longest_s=2.0)
