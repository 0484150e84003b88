"""Curves reach every backend's own file; wandb and swanlab, where they are installed, without asking for a network."""

import os
import subprocess
import sys

import pytest

from learner.curves import LoggerConfig, open_curves
from learner.run_folder import read_curves

SCRIPT = """
import socket, sys
from pathlib import Path
from learner.curves import LoggerConfig, open_curves

connect = socket.socket.connect
def loopback_only(self, address):
    if self.family != socket.AF_UNIX and address[0] not in ("127.0.0.1", "localhost", "::1"):
        raise PermissionError(f"{address} is not on this machine")
    return connect(self, address)
socket.socket.connect = loopback_only

with open_curves(LoggerConfig(backends=[sys.argv[1]]), Path(sys.argv[2]), "one", {"lr": 0.5}) as curves:
    for step in range(3):
        curves.log({"env/success_once": step / 2}, step)
"""


@pytest.mark.parametrize(
    ("backend", "pattern"), [("wandb", "wandb/offline-run-*/*.wandb"), ("swanlab", "swanlab/run-*/*.swanlab")]
)
def test_offline_backends_write_what_is_logged(backend, pattern, tmp_path):
    pytest.importorskip(backend)
    environment = {key: value for key, value in os.environ.items() if not key.startswith(backend.upper())}
    subprocess.run([sys.executable, "-c", SCRIPT, backend, str(tmp_path)], check=True, timeout=100, env=environment)
    (written,) = tmp_path.glob(pattern)
    content = written.read_bytes()
    assert content.count(b"env/success_once") >= 3
    assert b"lr" in content or "lr" in next(tmp_path.rglob("config.yaml")).read_text()


def test_tensorboard_shows_what_is_logged(tmp_path):
    with open_curves(LoggerConfig(), tmp_path, "one", {}) as curves:
        curves.log({"env/success_once": 0.5}, 7)
    assert read_curves(tmp_path / "tensorboard") == {"env/success_once": [(7, 0.5)]}
